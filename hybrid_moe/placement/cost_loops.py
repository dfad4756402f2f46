"""The loops of the solver of `cost`, compiled by numba at their first call: importing this module
imports numba.

Two of them: what the best set of so many hot experts costs a layer, and how a budget is divided
among layers. `hybrid_moe.placement.cost_placement` says what is minimised.
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
Bool = npt.NDArray[np.bool_]

NEAR = 1e-4
"""A set this near to its layer's bound is not searched further: 1 % is what the placement of a
whole model is allowed."""

STARTS = 64
"""Sets that are tried for each n: starting later leaves out more of the most used experts, of which
a good set has some."""


def _compiled(function: _Loop) -> _Loop:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _Loop = numba.njit(nogil=True, cache=False)(function)
    return compiled


@_compiled
def every_set(cold: F64, hot: F64, handover: float, beside: float, best: F64, sets: Bool) -> None:
    """Best value and set of at most n hot experts, n = 0..E, over all 2^E sets.

    Args:
        cold, hot: [parts, E] seconds of an expert on the CPU and on the GPU.
        handover, beside: see `LayerCost`.
        best: [E + 1], written. sets: [E + 1, E], written.
    """
    E = cold.shape[1]
    # of each set by its bits: an expert less than the set without its lowest, or one more
    left, taken = np.zeros((cold.shape[0], 1 << E)), np.zeros((hot.shape[0], 1 << E))
    size = np.zeros(1 << E, np.int64)
    chosen = np.zeros(E + 1, np.int64)
    for part in range(cold.shape[0]):
        left[part, 0] = cold[part].sum()
    best[:] = np.inf
    for mask in range(1 << E):
        if mask:
            lowest = 0
            while not (mask >> lowest) & 1:
                lowest += 1
            rest = mask & (mask - 1)
            size[mask] = size[rest] + 1
            for part in range(cold.shape[0]):
                left[part, mask] = left[part, rest] - cold[part, lowest]
            for part in range(hot.shape[0]):
                taken[part, mask] = taken[part, rest] + hot[part, lowest]
        n = size[mask]
        value = beside + taken[:, mask].max()
        if n < E:
            value = max(value, handover + left[:, mask].max())
        if value < best[n]:
            best[n], chosen[n] = value, mask
    for n in range(E + 1):
        if n and best[n - 1] <= best[n]:
            best[n], chosen[n] = best[n - 1], chosen[n - 1]
        for e in range(E):
            sets[n, e] = (chosen[n] >> e) & 1


@_compiled
def sorted_sets(
    cold: F64, hot: F64, handover: float, beside: float, best: F64, sets: Bool, bound: F64
) -> None:
    """Good sets of at most n hot experts, and what no set of so many can be below.

    While the CPU is the slower half, the n most used experts are the best set: nothing takes more
    from it. Where the GPU becomes the slower half, less would be better than they are: then experts
    are taken as long as each makes the layer faster, beginning at one place of the order after the
    other, until the bound is near.

    Args: as `every_set`, experts in descending order of use.
        bound: [E + 1], written.
    """
    E = cold.shape[1]
    _bound(cold, hot, handover, beside, bound)
    sets[:, :] = False
    for n in range(E):
        if n:
            best[n] = best[n - 1]
            sets[n, :] = sets[n - 1, :]
        else:
            best[0] = np.inf
        for start in range(min(STARTS, E)):
            if best[n] <= bound[n] * (1 + NEAR) and n:
                break
            for greedy in range(2):
                _take(cold, hot, handover, beside, start, n, greedy == 1, best, sets)
            if not n:
                break
    best[E] = bound[E]
    sets[E, :] = True
    if best[E - 1] <= best[E]:
        best[E] = best[E - 1]
        sets[E, :] = sets[E - 1, :]
    bound[E] = min(bound[E - 1], bound[E])


@_compiled
def _bound(cold: F64, hot: F64, handover: float, beside: float, bound: F64) -> None:
    """Of n < E hot experts at most, by each part of the CPU's time with each of the GPU's: experts
    that take x seconds of the one give `ratio` x to the other at least, with `ratio` the least
    hot[e] / cold[e]; and n of them take at most what the n largest do. bound[E]: all of them."""
    E = cold.shape[1]
    bound[:] = 0.0
    for c in range(cold.shape[0]):
        largest = np.sort(cold[c])[::-1]
        whole = handover + largest.sum()
        for g in range(hot.shape[0]):
            bound[E] = max(bound[E], beside + hot[g].sum())
            ratio = np.inf
            for e in range(E):
                if cold[c, e] > 0:
                    ratio = min(ratio, hot[g, e] / cold[c, e])
            if ratio == np.inf:
                ratio = 0.0
            level = (whole - beside) / (1 + ratio)  # the x at which both take as long
            most = 0.0
            for n in range(E):
                if n:
                    most += largest[n - 1]
                x = min(max(level, 0.0), most)
                bound[n] = max(bound[n], whole - x, beside + ratio * x)


@_compiled
def _take(
    cold: F64,
    hot: F64,
    handover: float,
    beside: float,
    start: int,
    n: int,
    greedy: bool,
    best: F64,
    sets: Bool,
) -> None:
    """Experts from `start` on, `n` of them at most: all, or if `greedy` each that makes the layer
    faster. The set is kept if it is the best."""
    cpu, gpu = np.zeros(cold.shape[0]), np.zeros(hot.shape[0])
    for part in range(cold.shape[0]):
        cpu[part] = cold[part].sum()
    value, count = max(handover + cpu.max(), beside), 0
    found = np.zeros(cold.shape[1], np.bool_)
    for e in range(start, cold.shape[1]):
        if count == n:
            break
        cpu -= cold[:, e]
        gpu += hot[:, e]
        with_it = max(handover + cpu.max(), beside + gpu.max())
        if greedy and with_it >= value:
            cpu += cold[:, e]
            gpu -= hot[:, e]
        else:
            value = with_it
            found[e] = True
            count += 1
    if value < best[n]:
        best[n] = value
        sets[n, :] = found


@_compiled
def divide(values: F64, weights: I64, counts: I64, choice: I64) -> F64:
    """The least sum over layers of values[l, n_l] whose weights[l, n_l] sum to at most u, for every
    budget u = 0..U.

    The exact dynamic program of the multiple-choice knapsack (Dudzinski and Walukiewicz, "Exact
    methods for the knapsack problem and its generalizations", 1987): L x E x U steps.

    Args:
        values, weights: [L, E + 1] for each number of hot experts; weights >= 0, ascending.
        counts: [L] experts of each layer: entries beyond are not looked at.
        choice: [L, U + 1], written: n_l of the best division of u among the first l + 1 layers.

    Returns:
        [U + 1] sums.
    """
    L, U = values.shape[0], choice.shape[1] - 1
    before, now = np.zeros(U + 1), np.empty(U + 1)
    for layer in range(L):
        now[:] = np.inf
        least = np.inf
        for n in range(counts[layer] + 1):
            value, weight = values[layer, n], weights[layer, n]
            if value >= least or weight > U:
                continue  # fewer experts do as well
            least = value
            for u in range(weight, U + 1):
                total = before[u - weight] + value
                if total < now[u]:
                    now[u] = total
                    choice[layer, u] = n
        before, now = now, before
    return before
