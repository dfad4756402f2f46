"""Figures of a routing profile, beside what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement.routing_profile import RoutedModel, RoutingProfile
from hybrid_moe.placement.routing_statistics import (
    drift,
    entropy_bits,
    halves,
    hit_rate_curve,
    strongest_pairs,
)
from hybrid_moe.placement.strategies import generate_gpu_experts_masks

COUNTS = np.array([[8, 4, 2, 2], [4, 4, 4, 4]])


def profile(
    windows: np.ndarray, tokens: list[int], pairs: np.ndarray | None = None
) -> RoutingProfile:
    _, L, E = windows.shape
    by_phase = np.zeros((3, L, E), np.int64)
    by_phase[1] = windows.sum(0)
    return RoutingProfile(
        RoutedModel("", 0, E, 2, tuple(range(L))), by_phase, np.array([0, sum(tokens), 0]),
        pairs, windows=windows, window_tokens=np.array(tokens, np.int64),
    )  # fmt: skip


def test_entropy() -> None:
    assert entropy_bits(COUNTS).tolist() == [1.75, 2.0]  # 1/2, 1/4, 1/8, 1/8
    assert entropy_bits(np.array([[5, 0, 0, 0]])).tolist() == [0.0]


counts = st.lists(st.integers(1, 50), min_size=8, max_size=8).map(lambda v: np.reshape(v, (2, 4)))


@given(counts, counts, st.integers(0, 8))
@settings(deadline=None)
def test_hit_rates_are_those_of_the_frequency_strategy(
    placed: np.ndarray, measured: np.ndarray, hot: int
) -> None:
    """Where no two experts are used equally, the masks of `generate_gpu_experts_masks` say which
    experts are hot; a layer counts as any other."""
    share = placed / placed.sum(1, keepdims=True)
    if len(set(share.ravel().tolist())) < 8:
        return
    mask = generate_gpu_experts_masks(share, hot).numpy()
    by_layer = [sum(measured[row][mask[row]]) / sum(measured[row]) for row in range(2)]
    assert hit_rate_curve(placed, measured)[hot] == pytest.approx(sum(by_layer) / 2)


@given(counts)
def test_nothing_catches_more_than_what_was_measured_on(measured: np.ndarray) -> None:
    best = hit_rate_curve(measured, measured)
    assert best[0] == 0 and best[-1] == pytest.approx(1)
    assert (np.diff(best) >= 0).all()
    assert (hit_rate_curve(measured[::-1], measured) <= best + 1e-12).all()


def test_halves() -> None:
    windows = np.arange(3 * 2 * 4).reshape(3, 2, 4)
    first, second = halves(profile(windows, [10, 30, 20])) or (None, None)
    np.testing.assert_array_equal(first, windows[:2].sum(0))
    np.testing.assert_array_equal(second, windows[2])
    first, second = halves(profile(windows, [100, 1, 1])) or (None, None)
    np.testing.assert_array_equal(first, windows[0])
    assert halves(profile(windows[:1], [4])) is None
    assert halves(profile(windows[:0], [])) is None


def test_drift_is_half_the_distance() -> None:
    windows = np.array([[[4, 4, 0, 0]], [[0, 0, 4, 4]], [[0, 4, 0, 4]]])
    found = drift(profile(windows, [4, 4, 4]))
    assert found.distance.tolist() == [1.0, 0.5]
    assert drift(profile(windows[:1], [4])).summary().startswith("unknown")


def test_chance_alone_is_what_repeated_samples_show() -> None:
    """4,000 pairs of samples from one distribution, 2 % of their mean allowed."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(32, 0.7))
    sizes = [400, 1000] * 4000
    windows = np.stack([rng.multinomial(n, p) for n in sizes])[:, None]
    found = drift(profile(windows, sizes))
    assert found.by_chance.mean() == pytest.approx(found.distance.mean(), rel=0.02)
    other = drift(profile(np.stack([windows[0], np.roll(windows[1], 5)]), sizes[:2]))
    assert other.distance[0] > 3 * other.by_chance[0]


def test_experts_that_go_together() -> None:
    """Tokens choose (0, 1) or (2, 3) in layer 1, and any two in layer 0."""
    T = 600
    pairs = np.zeros((2, 4, 4), np.int64)
    pairs[0] = T // 6 * (1 - np.eye(4, dtype=np.int64))
    for a, b in ((0, 1), (2, 3)):
        pairs[1, a, b] = pairs[1, b, a] = T // 2
    windows = np.full((1, 2, 4), T // 2)
    first, second, *rest = strongest_pairs(profile(windows, [T], pairs), 10)
    assert (first.layer, first.first, first.second, first.tokens) == (1, 0, 1, 300)
    assert first.lift == pytest.approx(2.0)  # half of the tokens use 0, half 1: a quarter by chance
    assert (second.first, second.second) == (2, 3)
    assert all(pair.layer == 0 or pair.lift < 1 for pair in rest) and rest == []
    assert strongest_pairs(profile(windows, [T]), 10) == []
    rare = profile(windows // 300, [2], pairs // 300)
    assert strongest_pairs(rare, 10) == [] and math.isclose(first.lift, second.lift)
