"""Which experts of a batch run now, and which run later: `runtime.deferral` says by what rule."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver
from hybrid_moe.cpu_kernels.drivers.records import Split


@driver
def rank(bits: int) -> int:
    """The bits of a float32 as an integer in the order of floats; both zeros are one."""
    return bits if bits >= 0 else -(bits + (1 << 31))


@driver
def protect(split: Split, first: int) -> None:
    """Mark the experts that the token whose ids begin at `first` protects: those that fewer than
    `protected` of its others go before, by a higher score or an earlier slot."""
    end = first + split.top_k
    for i in range(first, end):
        e = split.ids[i]
        if e < 0 or e >= split.experts:
            continue
        score = rank(split.scores[i])
        before = 0
        for j in range(first, end):
            other = split.ids[j]
            if other < 0 or other >= split.experts:
                continue
            theirs = rank(split.scores[j])
            if theirs > score or (theirs == score and j < i):
                before += 1
        if before < split.protected:
            split.protects[e] = 1


@driver
def split_routing(split: Split) -> int:
    """Fill in `now` and `later`; returns how many ids are out of range."""
    for e in range(split.experts):
        split.protects[e] = 0
    for token in range(split.tokens):
        protect(split, token * split.top_k)
    ignored = 0
    for i in range(split.tokens * split.top_k):
        e = split.ids[i]
        split.now[i] = -1
        split.later[i] = -1
        if e < 0 or e >= split.experts:
            ignored += 1
        elif split.protects[e] != 0:
            split.now[i] = e
        else:
            split.later[i] = e
    return ignored
