"""Strategy `cost` against every placement there is, and against a Lagrangian bound at full size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement import cost_placement
from hybrid_moe.placement.cost_placement import LayerCost, place_by_cost, place_for_budgets

times = st.floats(0, 1e-3, allow_subnormal=False)


@st.composite
def small_models(draw: st.DrawFn) -> tuple[list[LayerCost], int]:
    """At most 12 experts, so that all 4096 placements can be tried; and a budget."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda s: sum(s) <= 12))
    costs = []
    for layer, E in enumerate(sizes):
        row = st.lists(times, min_size=E, max_size=E)
        rows = st.lists(row, min_size=1, max_size=2).map(np.array)
        costs.append(
            LayerCost(
                layer,
                draw(st.integers(1, 9)),
                draw(rows),
                draw(rows),
                handover=draw(times),
                beside=draw(times),
            )
        )
    most = sum(cost.num_experts * cost.nbytes for cost in costs)
    return costs, draw(st.integers(0, most + 3))


def layer_seconds(cost: LayerCost, mask: tuple[bool, ...]) -> float:
    """The model of a layer, written out once more."""
    halves = [cost.beside]
    for part in cost.hot:
        halves.append(cost.beside + sum(t for t, hot in zip(part, mask, strict=True) if hot))
    for part in cost.cold if not all(mask) else ():
        cold = [t for t, hot in zip(part, mask, strict=True) if not hot]
        halves.append(cost.handover + sum(cold))
    return max(halves)


def optimum(costs: list[LayerCost], budget: int) -> float:
    """Of all placements within the budget: every set of one layer with every set of the others."""
    nbytes, seconds = np.zeros(1), np.zeros(1)
    for cost in costs:
        sets = list(itertools.product((False, True), repeat=cost.num_experts))
        own = np.array([layer_seconds(cost, mask) for mask in sets])
        sizes = np.array([cost.nbytes * sum(mask) for mask in sets])
        nbytes = np.add.outer(nbytes, sizes).ravel()
        seconds = np.add.outer(seconds, own).ravel()
    return float(seconds[nbytes <= budget].min())


@settings(max_examples=20, deadline=None)
@given(small_models())
def test_nothing_is_faster(case: tuple[list[LayerCost], int]) -> None:
    costs, budget = case
    placed = place_by_cost(costs, budget)
    best = optimum(costs, budget)
    hot = [tuple(map(bool, placed.masks[cost.layer])) for cost in costs]
    assert placed.nbytes == sum(c.nbytes * sum(m) for c, m in zip(costs, hot, strict=True))
    assert placed.nbytes <= budget
    said = sum(map(layer_seconds, costs, hot))
    assert placed.seconds == pytest.approx(said, rel=1e-12, abs=1e-15)
    assert placed.seconds == pytest.approx(best, rel=1e-12, abs=1e-15)
    assert placed.bound == pytest.approx(best, rel=1e-12, abs=1e-15)


@settings(max_examples=20, deadline=None)
@given(small_models(), st.integers(1, 12))
def test_coarse_units_stay_within_budget_and_bound(
    case: tuple[list[LayerCost], int], units: int
) -> None:
    costs, budget = case
    placed = place_by_cost(costs, budget, max_units=units)
    best = optimum(costs, budget)
    assert placed.nbytes <= budget
    assert placed.bound <= best * (1 + 1e-12) + 1e-15
    assert placed.seconds >= best * (1 - 1e-12) - 1e-15


@settings(max_examples=20, deadline=None)
@given(small_models())
def test_sorted_sets_keep_their_bound(case: tuple[list[LayerCost], int]) -> None:
    """The way of large layers, on layers whose sets can all be tried."""
    costs, budget = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_placement, "ENUMERATED", 0)
        placed = place_by_cost(costs, budget)
    best = optimum(costs, budget)
    assert placed.nbytes <= budget
    assert placed.bound <= best * (1 + 1e-12) + 1e-15
    assert placed.seconds >= best * (1 - 1e-12) - 1e-15


def large_model(
    L: int, E: int, slowdown: float, seed: int, sizes: tuple[int, ...] = (13_000_000,)
) -> list[LayerCost]:
    """Skewed routing as of trained models: shares by a Dirichlet distribution, which differ from
    layer to layer in how skewed they are. An expert takes 160 us on the CPU at 80 GB/s."""
    random = np.random.default_rng(seed)
    costs = []
    for layer in range(L):
        use = 8 * random.dirichlet(np.full(E, random.uniform(0.2, 2)))
        nbytes = sizes[layer % len(sizes)]
        cold = np.stack([use * nbytes / 80e9, use * 100e-6])
        costs.append(LayerCost(layer, nbytes, cold, cold[:1] / slowdown, 50e-6, 20e-6))
    return costs


def dual_bound(costs: list[LayerCost], budget: int) -> float:
    """A Lagrangian lower bound, from sorted prefix sums alone: for each price of a byte, every
    layer chooses its n by itself, with the time that x seconds off the CPU leave at least."""
    best = 0.0
    for price in np.logspace(-17, -11, 61):
        total = -price * budget
        for cost in costs:
            E = cost.num_experts
            cold, hot = cost.cold[0], cost.hot[0]
            off = np.concatenate([[0.0], np.cumsum(np.sort(cold)[::-1])])
            ratio = (hot[cold > 0] / cold[cold > 0]).min()
            whole = cost.handover + off[-1]
            x = np.clip((whole - cost.beside) / (1 + ratio), 0, off)
            least = np.maximum(whole - x, cost.beside + ratio * x)
            least[E] = cost.beside + hot.sum()
            total += (least + price * cost.nbytes * np.arange(E + 1)).min()
        best = max(best, total)
    return best


@pytest.mark.parametrize("slowdown", [12.0, 2.0])
@pytest.mark.parametrize("sizes", [(13_000_000,), (13_000_007, 24_000_001)])
def test_large_models_are_within_one_percent(slowdown: float, sizes: tuple[int, ...]) -> None:
    costs = large_model(16, 96, slowdown, seed=3, sizes=sizes)
    everything = sum(cost.nbytes * cost.num_experts for cost in costs)
    budgets = [int(share * everything) for share in (0.0, 0.1, 0.25, 0.5, 0.8, 1.0)]
    seconds = []
    for budget, placed in zip(budgets, place_for_budgets(costs, budgets), strict=True):
        assert placed.nbytes <= budget
        assert placed.ratio <= 1.01
        assert dual_bound(costs, budget) <= placed.seconds * (1 + 1e-9)
        seconds.append(placed.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[2] < 0.9 * seconds[0]


def test_a_slow_link_to_nothing_fills_whole_layers() -> None:
    """Where the hand-over is what counts, it is saved by a whole layer and by nothing less."""
    costs = [
        LayerCost(layer, 10, np.full((1, 4), 1e-6), np.full((1, 4), 1e-7), handover=1e-3)
        for layer in (1, 2)
    ]
    placed = place_by_cost(costs, 40)
    assert sorted(int(mask.sum()) for mask in placed.masks.values()) == [0, 4]
    assert placed.ratio == 1.0


def test_a_gpu_as_slow_as_the_processor_gets_half() -> None:
    cold = np.full((1, 64), 1e-5)
    placed = place_by_cost([LayerCost(0, 1, cold, cold)], 64)
    assert placed.seconds == pytest.approx(32e-5) and placed.masks[0].sum() == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cold": np.ones((1, 3))}, r"layer 4: cold \(1, 3\) and hot \(1, 1\)"),
        ({"cold": np.ones(1)}, r"must be \[parts, experts\]"),
        ({"cold": np.ones((1, 0)), "hot": np.ones((1, 0))}, "layer 4 has no experts"),
        ({"cold": np.ones((0, 1))}, "their times no parts"),
        ({"cold": np.array([[np.nan]])}, "layer 4: times must be finite"),
        ({"handover": -1.0}, "not below 0"),
        ({"nbytes": 0}, "an expert of 0 bytes"),
    ],
)
def test_costs_that_are_none(change: dict[str, object], words: str) -> None:
    one = np.ones((1, 1))
    arguments: dict[str, object] = {"cold": one, "hot": one, "nbytes": 1, **change}
    with pytest.raises(ValueError, match=words):
        LayerCost(layer=4, **arguments)  # type: ignore[arg-type]


def test_questions_that_are_none() -> None:
    cost = LayerCost(0, 1, np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="a layer with experts"):
        place_by_cost([], 1)
    with pytest.raises(ValueError, match="twice"):
        place_by_cost([cost, cost], 1)
    with pytest.raises(ValueError, match="a budget of -1 bytes"):
        place_by_cost([cost], -1)
