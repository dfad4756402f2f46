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
def deal(weights: F64, order: I64, sizes: I64) -> I64:
    """The pack of each of n weights, `sizes` in each, n in all: in `order`, the largest first, each
    to the lightest pack that has room (Graham's LPT rule with given numbers, as DeepSeek's EPLB
    packs)."""
    packs = sizes.shape[0]
    of = np.zeros(weights.shape[0], np.int64)
    loads, items = np.zeros(packs), np.zeros(packs, np.int64)
    for item in order:
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
    expert = np.zeros(replicas, np.int64)
    count = np.zeros(E)
    for replica in range(replicas):
        most = replica
        if replica >= E:
            most = 0
            for e in range(1, E):
                if loads[e] / count[e] > loads[most] / count[most]:
                    most = e
        expert[replica] = most
        count[most] += 1
    return expert


@_compiled
def balance(loads: F64, expert: I64, pack: I64, packs: int, kicks: int) -> float:
    """Make the heaviest pack lighter, in place, and say its load.

    Exchanges replicas of the heaviest pack with lighter ones, and gives one expert a replica more
    where another has one to spare, as long as either helps; then starts again from the best with a
    few random exchanges, `kicks` times. It ends where no pack is heavier than the mean.

    Args:
        loads: [E]. expert, pack: [R], rewritten.
    """
    R = expert.shape[0]
    least, state = 0.0, 7  # the same exchanges at each call
    for load in loads:
        least += load / packs
    best = _descend(loads, expert, pack, packs)
    tried_expert, tried_pack = np.zeros(R, np.int64), np.zeros(R, np.int64)
    for _ in range(kicks):
        if best * LESS <= least or packs == R:
            break
        for replica in range(R):
            tried_expert[replica], tried_pack[replica] = expert[replica], pack[replica]
        for _exchange in range(3):
            # a linear congruential generator: Park and Miller, Communications of the ACM 31 (1988)
            state = state * 48271 % 2147483647
            a = state % R
            state = state * 48271 % 2147483647
            b = state % R
            tried_pack[a], tried_pack[b] = tried_pack[b], tried_pack[a]
        found = _descend(loads, tried_expert, tried_pack, packs)
        if found < best * LESS:
            best = found
            for replica in range(R):
                expert[replica], pack[replica] = tried_expert[replica], tried_pack[replica]
    return best


@_compiled
def _descend(loads: F64, expert: I64, pack: I64, packs: int) -> float:
    """Exchange and replicate until neither helps; the heaviest pack's load."""
    share, sums = np.zeros(loads.shape[0]), np.zeros(packs)
    while True:
        heaviest = _weigh(loads, expert, pack, share, sums)
        if _exchange(share, expert, pack, sums, heaviest):
            continue
        load: float = sums[heaviest]
        if not _give(loads, expert, pack, share, sums, heaviest):
            return load


@_compiled
def _weigh(loads: F64, expert: I64, pack: I64, share: F64, sums: F64) -> int:
    """Write the load of a replica of each expert, and that of each pack; the heaviest pack."""
    for e in range(share.shape[0]):
        share[e] = 0
    for e in expert:
        share[e] += 1
    for e in range(share.shape[0]):
        share[e] = loads[e] / max(share[e], 1.0)
    for p in range(sums.shape[0]):
        sums[p] = 0
    for replica in range(expert.shape[0]):
        sums[pack[replica]] += share[expert[replica]]
    heaviest = 0
    for p in range(sums.shape[0]):
        if sums[p] > sums[heaviest]:
            heaviest = p
    return heaviest


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
def _give(loads: F64, expert: I64, pack: I64, share: F64, sums: F64, heaviest: int) -> bool:
    """Turn a replica of an expert that has several into one of another expert, where the heaviest
    pack of all is then lighter; the best change in which the heaviest pack has one of the two.
    `share` and `sums` are written over."""
    R = expert.shape[0]
    count = np.zeros(loads.shape[0], np.int64)
    for e in expert:
        count[e] += 1
    least, gives, takes = sums[heaviest] * LESS, -1, -1
    for b in range(R):
        if count[expert[b]] < 2:
            continue
        old = expert[b]
        for a in range(R):
            if (pack[a] != heaviest and pack[b] != heaviest) or expert[a] == old:
                continue
            expert[b] = expert[a]
            load = sums[_weigh(loads, expert, pack, share, sums)]
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
    share, sums = np.zeros(loads.shape[0]), np.zeros(packs)
    limit = sums[_weigh(loads, expert, pack, share, sums)] / LESS
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
    tokens: float = together[e, f] * (share[e] / loads[e]) * (share[f] / loads[f])
    return tokens
