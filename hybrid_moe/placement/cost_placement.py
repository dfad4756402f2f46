"""Strategy `cost`: the hot experts with which a step is fastest, under a budget of GPU memory.

A layer waits for the slower of its halves. Where S are its hot experts, its time is

    f(S) = max( handover + sum of cold[e] over e not in S,   the CPU, if any expert is cold
                beside + sum of hot[e] over e in S )         the GPU

and a placement minimises the sum of f over layers, its bytes at most the budget. (Reading and
multiplying are summed apart, and the longer sum counts.) Hot experts gain less and less: at first
each takes its whole time from the CPU, the most used ones the most; once the GPU is the slower half
further ones gain nothing; the last one saves the hand-over as well. So the question is a knapsack
with one choice per layer (how many of its experts are hot), solved in two steps:

1. per layer the best set of at most n experts, for every n. Up to `ENUMERATED` experts all sets are
   tried. Above, the n most used ones, which is best as long as the CPU is the slower half; where
   it is not, sets near a bound (`cost_loops.sorted_sets`).
2. over layers a dynamic program in units of memory. Where experts of all layers are equally large,
   or their sizes have a common divisor of which the budget has at most `MAX_UNITS`, it is exact.
   Else sizes are rounded up to units, and for the bound down: no placement within the budget is
   faster than the bound.

So a result says how far from the best it can be at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ENUMERATED = 16
"""Experts of a layer whose sets are all tried: 65,536 sets take a few milliseconds."""

MAX_UNITS = 1 << 15
"""Units of memory that the budget is divided into at most. 61 layers of 384 experts are 23,424 of
one size. Rounding then costs at most one unit for each layer, 0.2 % of the budget for 61."""


@dataclass(frozen=True)
class LayerCost:
    """What the experts of a layer add to a step, in seconds.

    Attributes:
        layer: index in the model, dense layers counted.
        nbytes: of one expert on a GPU.
        cold: float64 [parts, E], what each adds to the CPU's half if it is cold. Its parts (reading
            and multiplying) overlap: the one with the longest sum counts.
        hot: float64 [parts, E], what each adds to the GPU's half if it is hot.
        handover: what the CPU's half takes beside, if any expert is cold.
        beside: what the GPU does in any case while the CPU works, such as a shared expert.
    """

    layer: int
    nbytes: int
    cold: F64
    hot: F64
    handover: float = 0.0
    beside: float = 0.0

    def __post_init__(self) -> None:
        shapes = self.cold.shape, self.hot.shape
        if {self.cold.ndim, self.hot.ndim} != {2} or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"layer {self.layer}: cold {shapes[0]} and hot {shapes[1]} must be [parts, experts]"
            )
        if not self.cold.size or not self.hot.size:
            raise ValueError(f"layer {self.layer} has no experts, or their times no parts")
        times = np.concatenate([self.cold.ravel(), self.hot.ravel(), [self.handover, self.beside]])
        if not (np.isfinite(times).all() and (times >= 0).all()):
            raise ValueError(f"layer {self.layer}: times must be finite and not below 0")
        if self.nbytes < 1:
            raise ValueError(f"layer {self.layer}: an expert of {self.nbytes} bytes, must be 1")

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.cold.shape[1])

    def seconds(self, hot: Bool) -> float:
        """f of the experts that are True in bool [E]."""
        gpu = self.beside + float(self.hot[:, hot].sum(1).max())
        if hot.all():
            return gpu
        return max(self.handover + float(self.cold[:, ~hot].sum(1).max()), gpu)


@dataclass(frozen=True)
class CostPlacement:
    """Hot experts, and how good they are.

    Attributes:
        masks: layer -> bool [E], True for hot experts.
        seconds: what the layers' experts take in a step.
        bound: what they take at least under any placement within the budget.
        nbytes: of the hot experts.
    """

    masks: Mapping[int, Bool]
    seconds: float
    bound: float
    nbytes: int

    @property
    def ratio(self) -> float:
        """`seconds` over `bound`: 1 where it is known to be the best."""
        return self.seconds / self.bound if self.bound else 1.0


@dataclass(frozen=True)
class _Curve:
    """Of a layer, for n = 0..E hot experts at most: seconds, bounds, and sets bool [E + 1, E]."""

    best: F64
    bound: F64
    sets: Bool


def place_by_cost(
    costs: Sequence[LayerCost], budget: int, max_units: int = MAX_UNITS
) -> CostPlacement:
    """The fastest placement whose experts take at most `budget` bytes of GPU memory.

    Args:
        costs: of every layer with experts, one at least.
        budget: bytes.
        max_units: see `MAX_UNITS`.

    Raises:
        ValueError: no layer, one twice, or a budget below 0.
    """
    return place_for_budgets(costs, [budget], max_units)[0]


def place_for_budgets(
    costs: Sequence[LayerCost], budgets: Sequence[int], max_units: int = MAX_UNITS
) -> list[CostPlacement]:
    """The same for several budgets, which one dynamic program answers together."""
    if not costs:
        raise ValueError("a placement needs a layer with experts")
    if len({cost.layer for cost in costs}) < len(costs):
        raise ValueError("a layer is there twice")
    if min(budgets, default=0) < 0:
        raise ValueError(f"a budget of {min(budgets)} bytes, must be 0 or more")
    curves = [_curve(cost) for cost in costs]
    sizes = np.array([cost.nbytes for cost in costs], np.int64)
    everything = sum(cost.num_experts * cost.nbytes for cost in costs)
    rooms = [min(budget, everything) for budget in budgets]
    unit = math.gcd(*map(int, sizes))
    exact = max(rooms, default=0) // unit <= max_units
    if not exact:
        unit = -(-max(rooms) // max_units)
    nbytes = sizes[:, None] * np.arange(max(cost.num_experts for cost in costs) + 1)
    units = max(rooms, default=0) // unit
    divided = _Divisions([curve.best for curve in curves], -(-nbytes // unit), units)
    below = _Divisions([curve.bound for curve in curves], nbytes // unit, units)
    found = []
    for room in rooms:
        counts = divided.counts(room // unit)
        if not exact:
            _spend_rest(counts, costs, curves, room)
        masks = {
            cost.layer: curve.sets[count].copy()
            for cost, curve, count in zip(costs, curves, counts, strict=True)
        }
        seconds = sum(cost.seconds(masks[cost.layer]) for cost in costs)
        used = sum(int(masks[cost.layer].sum()) * cost.nbytes for cost in costs)
        # sums in another order may differ in the last bits
        bound = min(float(below.sums[room // unit]), seconds)
        found.append(CostPlacement(masks, seconds, bound, used))
    return found


class _Divisions:
    """The best division of every budget up to so many units among layers.

    Attributes:
        sums: float64 [units + 1], the least sum of the layers' values.
    """

    def __init__(self, values: Sequence[F64], weights: I64, units: int) -> None:
        """Args:
        values: of each layer for n = 0..E.
        weights: [L, E + 1] units that n experts of it take.
        """
        from hybrid_moe.placement.cost_loops import divide

        self._weights = weights
        table = np.full(weights.shape, np.inf)
        for row, curve in zip(table, values, strict=True):
            row[: len(curve)] = curve
        experts = np.array([len(curve) - 1 for curve in values])
        self._choice = np.zeros((len(values), units + 1), np.int64)
        self.sums: F64 = divide(table, weights, experts, self._choice)

    def counts(self, units: int) -> list[int]:
        """The n of each layer that make up `sums[units]`."""
        chosen, left = [0] * len(self._weights), units
        for layer in reversed(range(len(chosen))):
            chosen[layer] = int(self._choice[layer, left])
            left -= int(self._weights[layer, chosen[layer]])
        return chosen


def _spend_rest(
    counts: list[int], costs: Sequence[LayerCost], curves: Sequence[_Curve], room: int
) -> None:
    """Rounding up leaves bytes over: the next experts that fit and gain most, one by one."""
    left = room - sum(n * cost.nbytes for n, cost in zip(counts, costs, strict=True))
    while True:
        gains = [
            (float(curve.best[n] - curve.best[n + 1]), at)
            for at, (curve, n) in enumerate(zip(curves, counts, strict=True))
            if n < costs[at].num_experts and costs[at].nbytes <= left
        ]
        gain, at = max(gains, default=(0.0, 0))
        if gain <= 0:
            return
        counts[at] += 1
        left -= costs[at].nbytes


def _curve(cost: LayerCost) -> _Curve:
    """The curve of a layer."""
    from hybrid_moe.placement.cost_loops import every_set, sorted_sets

    E = cost.num_experts
    order = np.argsort(-cost.cold.sum(0), kind="stable")
    # in one order of memory: numba compiles its loops again for each
    cold, hot = (np.ascontiguousarray(times[:, order]) for times in (cost.cold, cost.hot))
    best, sets = np.empty(E + 1), np.zeros((E + 1, E), np.bool_)
    if E <= ENUMERATED:
        every_set(cold, hot, cost.handover, cost.beside, best, sets)
        bound = best
    else:
        nothing = np.zeros(E, np.bool_)
        best[0], best[E] = cost.seconds(nothing), cost.seconds(~nothing)
        below = _bounds(cost)
        sorted_sets(cold, hot, cost.handover, cost.beside, best, sets, below)
        sets[E] = True
        bound = np.append(below, min(below[-1], best[E]))
        if best[E - 1] <= best[E]:
            best[E], sets[E] = best[E - 1], sets[E - 1]
    by_id = np.empty_like(sets)
    by_id[:, order] = sets
    return _Curve(best, bound, by_id)


def _bounds(cost: LayerCost) -> F64:
    """float64 [E], below which no n hot experts are, n = 0..E - 1.

    Of each part of the CPU's time with each of the GPU's: experts that take x seconds of the one
    give `ratio` x to the other at least, where `ratio` is the least hot[e] / cold[e]; and n of them
    take at most what the n largest do. The best x is where both halves take as long, or that most.
    """
    E = cost.num_experts
    bound = np.zeros(E)
    for cold in cost.cold:
        most = np.concatenate([[0.0], np.cumsum(np.sort(cold)[::-1])])[:E]
        whole = cost.handover + float(cold.sum())
        for hot in cost.hot:
            used = cold > 1e-200  # less is nothing, and what is divided by it no number
            ratio = float((hot[used] / cold[used]).min()) if used.any() else 0.0
            x = np.minimum(max((whole - cost.beside) / (1 + ratio), 0.0), most)
            bound = np.maximum(bound, np.maximum(whole - x, cost.beside + ratio * x))
    return bound
