"""The loops of the solver of `cost`, compiled by numba at their first call: importing this module
imports numba.

Two of them: what the best set of so many hot experts costs a layer, and how a budget is divided
among layers. `hybrid_moe.placement.cost_placement` says what is minimised. Sums are written out:
NumPy's functions over arrays would take numba several times as long to compile.
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
    E, cpus, gpus = cold.shape[1], cold.shape[0], hot.shape[0]
    # sums of the experts outside and inside of each set: one expert apart from those of the set
    # without its lowest
    sums = np.zeros((1 << E, cpus + gpus))
    size = np.zeros(1 << E, np.int64)
    chosen = np.zeros(E + 1, np.int64)
    for part in range(cpus):
        for e in range(E):
            sums[0, part] += cold[part, e]
    for n in range(E + 1):
        best[n] = np.inf
    for mask in range(1 << E):
        if mask:
            lowest = 0
            while not (mask >> lowest) & 1:
                lowest += 1
            rest = mask & (mask - 1)
            size[mask] = size[rest] + 1
            for part in range(cpus):
                sums[mask, part] = sums[rest, part] - cold[part, lowest]
            for part in range(gpus):
                sums[mask, cpus + part] = sums[rest, cpus + part] + hot[part, lowest]
        n = size[mask]
        value = beside
        for part in range(gpus):
            value = max(value, beside + sums[mask, cpus + part])
        if n < E:
            for part in range(cpus):
                value = max(value, handover + sums[mask, part])
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
    """Good sets of at most n hot experts, n = 1..E - 1.

    While the CPU is the slower half, the n most used experts are the best set: nothing takes more
    from it. Where the GPU becomes the slower half, less would be better than they are: then experts
    are taken as long as each makes the layer faster, beginning at one place of the order after the
    other, until the bound is near.

    Args: as `every_set`, experts in descending order of use; best[0] is known.
        bound: [E], what no set of n is below.
    """
    parts = cold.shape[0] + hot.shape[0]
    E = cold.shape[1]
    sums, tried = np.zeros(parts), np.zeros(parts)
    found = np.zeros(E, np.bool_)
    for n in range(1, E):
        best[n] = best[n - 1]
        for e in range(E):
            sets[n, e] = sets[n - 1, e]
        for attempt in range(2 * min(STARTS, E)):
            if best[n] <= bound[n] * (1 + NEAR):
                break
            # all from the start on, then each of them that makes the layer faster
            start, greedy = attempt // 2, attempt % 2 == 1
            value = _add(cold, hot, handover, beside, sums, -1, sums)
            count = 0
            for e in range(E):
                found[e] = False
            for e in range(start, E):
                if count == n:
                    break
                with_it = _add(cold, hot, handover, beside, sums, e, tried)
                if greedy and with_it >= value:
                    continue
                for part in range(parts):
                    sums[part] = tried[part]
                value = with_it
                found[e] = True
                count += 1
            if value < best[n]:
                best[n] = value
                for e in range(E):
                    sets[n, e] = found[e]


@_compiled
def _add(
    cold: F64, hot: F64, handover: float, beside: float, sums: F64, expert: int, to: F64
) -> float:
    """Seconds of a layer with one more hot expert, and its sums [parts] in `to`; -1 begins with
    none."""
    cpus, cpu, gpu = cold.shape[0], 0.0, 0.0
    for part in range(cpus):
        if expert < 0:
            total = 0.0
            for e in range(cold.shape[1]):
                total += cold[part, e]
        else:
            total = sums[part] - cold[part, expert]
        to[part] = total
        cpu = max(cpu, total)
    for part in range(hot.shape[0]):
        total = 0.0 if expert < 0 else sums[cpus + part] + hot[part, expert]
        to[cpus + part] = total
        gpu = max(gpu, total)
    return max(handover + cpu, beside + gpu)


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
    before, now = np.zeros(U + 1), np.zeros(U + 1)
    for layer in range(L):
        for u in range(U + 1):
            now[u] = np.inf
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
