"""Costs of experts are those of the timeline, and profiles become shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement.routed_costs import expected_use, layer_cost, place_by_bytes
from hybrid_moe.placement.routing_profile import RoutedModel, RoutingProfile
from hybrid_moe.schedule.layer_times import layer_times
from hybrid_moe.schedule.layer_work import (
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
    experts_met,
)
from hybrid_moe.schedule.machine_rates import MachineRates

EXPERT = ExpertWork(13e6, 12e6, 25e6, one_token_rate=1e11, many_tokens_rate=4e11)
RATES = MachineRates(80e9, 700e9, 30e12, submit=50e-6, back=40e-6, launch=5e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.floats(0, 1))
def test_a_set_costs_what_the_timeline_says(seed: int, tokens: int, share: float) -> None:
    random = np.random.default_rng(seed)
    use = random.dirichlet(np.full(16, 0.5)) * 4
    use = np.minimum(use, 1)
    hot = random.random(16) < share
    work = LayerWork(3, GpuAmount(1e6, 1e9), GpuAmount(20e6, 1e8), EXPERT)
    split = ExpertSplit(hot=experts_met(use, tokens, hot), cpu=experts_met(use, tokens, ~hot))
    times = layer_times(work, split, RATES)
    cost = layer_cost(work, use, 1, RATES, tokens)
    if split.cpu.experts:
        assert cost.seconds(hot) == pytest.approx(times.alone - times.before, rel=1e-9)


def test_a_layer_without_experts_has_no_costs() -> None:
    with pytest.raises(ValueError, match="layer 7 has no experts"):
        layer_cost(LayerWork(7, GpuAmount()), np.ones(2), 1, RATES)


def profile(prefill: list[list[int]], decode: list[list[int]]) -> RoutingProfile:
    """Of layers 1, 2, ... of a model with top-2 routing."""
    counts = np.array([prefill, decode, np.zeros_like(prefill)], np.int64)
    model = RoutedModel("", 0, len(prefill[0]), 2, tuple(range(1, len(prefill) + 1)))
    return RoutingProfile(model, counts, counts.sum(2)[:, 0] // 2)


def test_much_decode_is_believed_and_little_is_not() -> None:
    prompts = [[600, 200, 100, 100]]
    alone = expected_use(profile(prompts, [[0, 0, 0, 0]]))
    np.testing.assert_allclose(alone, [[1.0, 0.4, 0.2, 0.2]])  # nothing is taken twice by a token
    little = expected_use(profile(prompts, [[0, 0, 0, 2]]))
    np.testing.assert_allclose(little[0, 3], 0.2, atol=0.06)
    much = expected_use(profile(prompts, [[0, 10**6, 0, 10**6]]))
    np.testing.assert_allclose(much, [[0, 1, 0, 1]], atol=1e-3)


def test_bytes_of_unlike_layers() -> None:
    """Layer 2's experts are three times as large: one of them is worth three of layer 1, if the
    tokens are spread as evenly."""
    measured = profile([[30, 30, 30, 30], [80, 20, 10, 10]], [[0] * 4, [0] * 4])
    masks = place_by_bytes(measured, {1: 10, 2: 30}, 30)
    assert [int(masks[layer].sum()) for layer in (1, 2)] == [0, 1] and masks[2][0]
    masks = place_by_bytes(measured, {1: 10, 2: 30}, 75)
    assert [int(masks[layer].sum()) for layer in (1, 2)] == [4, 1]
