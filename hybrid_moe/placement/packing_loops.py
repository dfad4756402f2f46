"""The loops of balanced packing, compiled by numba at their first call: importing this module
imports numba. `hybrid_moe.placement.balanced_packing` says what is packed and why.

Everything here is about one node: E experts with loads, R replicas of them, packs (GPUs) of so many
replicas each. A replica has its expert's load divided by the number of its replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

_Loop = TypeVar("_Loop", bound=Callable[..., Any])
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

LESS = 1 - 1e-12
"""A sum is smaller if it is below so much of the other: sums in another order differ in the last
bits, and a search that took that for progress would not end."""


def _compiled(function: _Loop) -> _Loop:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _Loop = numba.njit(nogil=True, cache=False)(function)
    return compiled


@_compiled
def deal(weights: F64, sizes: I64) -> I64:
    """The pack of each of n weights, `sizes` in each, n in all: the largest first, each to the
    lightest pack that has room (Graham's LPT rule with given numbers, as DeepSeek's EPLB packs)."""
    packs = sizes.shape[0]
    of = np.empty(weights.shape[0], np.int64)
    loads, items = np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-weights, kind="mergesort"):
        best = -1
        for pack in range(packs):
            if items[pack] < sizes[pack] and (best < 0 or loads[pack] < loads[best]):
                best = pack
        of[item] = best
        loads[best] += weights[item]
        items[best] += 1
    return of


@_compiled
def replicate(loads: F64, replicas: int) -> I64:
    """Expert of each of R replicas: one of each, and the others one by one to the expert whose
    replicas have the most load. No division into replicas has a smaller largest load."""
    E = loads.shape[0]
    expert = np.arange(replicas)
    count = np.ones(E)
    for replica in range(E, replicas):
        most = np.argmax(loads / count)
        expert[replica] = most
        count[most] += 1
    return expert


@_compiled
def balance(loads: F64, expert: I64, pack: I64, packs: int, kicks: int) -> float:
    """Make the heaviest pack lighter, in place, and say its load.

    Exchanges replicas of the heaviest pack with lighter ones, and gives one expert a replica more
    where another has one to spare, as long as either helps; then starts again from the
    best with a few random exchanges, `kicks` times. It ends where no pack is heavier than the mean.

    Args:
        loads: [E]. expert, pack: [R], rewritten.
    """
    np.random.seed(7)  # numba's own generator; the same placement at each call
    R = expert.shape[0]
    least = loads.sum() / packs
    best = _descend(loads, expert, pack, packs)
    tried_expert, tried_pack = expert.copy(), pack.copy()
    for _ in range(kicks):
        if best * LESS <= least or packs == R:
            break
        tried_expert[:] = expert
        tried_pack[:] = pack
        for _exchange in range(3):
            a, b = np.random.randint(R), np.random.randint(R)
            tried_pack[a], tried_pack[b] = tried_pack[b], tried_pack[a]
        found = _descend(loads, tried_expert, tried_pack, packs)
        if found < best * LESS:
            best = found
            expert[:] = tried_expert
            pack[:] = tried_pack
    return best


@_compiled
def _descend(loads: F64, expert: I64, pack: I64, packs: int) -> float:
    """Exchange and replicate until neither helps; the heaviest pack's load."""
    while True:
        share = _shares(loads, expert)
        sums = _sums(share, expert, pack, packs)
        heaviest = int(np.argmax(sums))
        if _exchange(share, expert, pack, sums, heaviest):
            continue
        if not _give(loads, expert, pack, packs, sums[heaviest], heaviest):
            return float(sums[heaviest])


@_compiled
def _shares(loads: F64, expert: I64) -> F64:
    """Load of a replica of each expert."""
    count = np.zeros(loads.shape[0])
    for e in expert:
        count[e] += 1
    return loads / np.maximum(count, 1)


@_compiled
def _sums(share: F64, expert: I64, pack: I64, packs: int) -> F64:
    sums = np.zeros(packs)
    for replica in range(expert.shape[0]):
        sums[pack[replica]] += share[expert[replica]]
    return sums


@_compiled
def _exchange(share: F64, expert: I64, pack: I64, sums: F64, heaviest: int) -> bool:
    """The exchange with the heaviest pack after which the heavier of the two is lightest, if that
    is lighter than it was."""
    R = expert.shape[0]
    least, from_it, to_it = sums[heaviest] * LESS, -1, -1
    for a in range(R):
        if pack[a] != heaviest:
            continue
        for b in range(R):
            less = share[expert[a]] - share[expert[b]]
            if pack[b] == heaviest or less <= 0:
                continue
            heavier = max(sums[heaviest] - less, sums[pack[b]] + less)
            if heavier < least:
                least, from_it, to_it = heavier, a, b
    if from_it < 0:
        return False
    pack[from_it], pack[to_it] = pack[to_it], pack[from_it]
    return True


@_compiled
def _give(
    loads: F64, expert: I64, pack: I64, packs: int, heaviest_load: float, heaviest: int
) -> bool:
    """Turn a replica of an expert that has several into one of another expert, where the heaviest
    pack of all is then lighter; the best change in which the heaviest pack has one of the two."""
    R = expert.shape[0]
    count = np.zeros(loads.shape[0], np.int64)
    for e in expert:
        count[e] += 1
    least, gives, takes = heaviest_load * LESS, -1, -1
    for b in range(R):
        if count[expert[b]] < 2:
            continue
        old = expert[b]
        for a in range(R):
            if (pack[a] != heaviest and pack[b] != heaviest) or expert[a] == old:
                continue
            expert[b] = expert[a]
            load = _sums(_shares(loads, expert), expert, pack, packs).max()
            expert[b] = old
            if load < least:
                least, gives, takes = load, b, a
    if gives < 0:
        return False
    expert[gives] = expert[takes]
    return True


@_compiled
def spread(loads: F64, together: F64, expert: I64, pack: I64, packs: int) -> None:
    """Exchange replicas while that puts fewer that work together into one pack and makes no pack
    heavier than the heaviest is.

    Args:
        loads: [E]. expert: [R]. pack: [R], rewritten.
        together: [E, E] tokens that use both; symmetric. The diagonal is what two replicas of one
            expert in one pack cost.
    """
    R = expert.shape[0]
    share = _shares(loads, expert)
    sums = _sums(share, expert, pack, packs)
    limit = sums.max() / LESS
    # of each replica with each pack's others
    with_pack = np.zeros((R, packs))
    for a in range(R):
        for b in range(R):
            if a != b:
                with_pack[a, pack[b]] += _beside(loads, share, together, expert[a], expert[b])
    moved = True
    while moved:
        moved = False
        for a in range(R):
            for b in range(a):
                p, q = pack[a], pack[b]
                less = share[expert[a]] - share[expert[b]]
                if p == q or sums[p] - less > limit or sums[q] + less > limit:
                    continue
                both = _beside(loads, share, together, expert[a], expert[b])
                now = with_pack[a, p] + with_pack[b, q]
                then = with_pack[a, q] + with_pack[b, p] - 2 * both
                if then >= now * LESS:
                    continue
                sums[p] -= less
                sums[q] += less
                for c in range(R):
                    change = 0.0
                    if c != b:
                        change += _beside(loads, share, together, expert[b], expert[c])
                    if c != a:
                        change -= _beside(loads, share, together, expert[a], expert[c])
                    with_pack[c, p] += change
                    with_pack[c, q] -= change
                pack[a], pack[b] = q, p
                moved = True


@_compiled
def _beside(loads: F64, share: F64, together: F64, e: int, f: int) -> float:
    """Tokens that use one replica of e and one of f: each token takes any of an expert's."""
    if loads[e] == 0 or loads[f] == 0:
        return 0.0
    return float(together[e, f] * (share[e] / loads[e]) * (share[f] / loads[f]))
