"""The benchmarks of online placement: what they measure is what online placement promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from online_placement import SETTLED, TRACE, after_change, best, hit_rate
from traffic_day import HOUR, Server, simulate


@pytest.fixture(scope="module")
def traces() -> dict[str, np.ndarray]:
    with np.load(TRACE) as stored:
        return {name: stored[name] for name in stored.files}


def test_the_best_placement_is_the_best(traces: dict[str, np.ndarray]) -> None:
    """By brute force over one layer."""
    for trace in traces.values():
        one = trace[:300, :1]
        rates = [np.isin(one, chosen).mean() for chosen in itertools.combinations(range(16), 4)]
        assert hit_rate(one, best(one, 4)) == pytest.approx(max(rates))


def test_within_five_percent_500_tokens_after_a_change(traces: dict[str, np.ndarray]) -> None:
    """Of the best that does not move and knows what comes, for each pair of texts; and hardly
    anything moves after that."""
    assert len(traces) == 3
    for one, other in itertools.permutations(traces, 2):
        change = after_change(traces[one], traces[other], hot=4)
        assert change.online >= 0.95 * change.optimum
        assert change.stays < change.online, "there is something to gain"
        assert change.swaps_settled <= (len(traces[other]) - SETTLED) / 100
        assert change.returns <= change.swaps / 4


@pytest.mark.parametrize(
    ("hours", "seed"), [(6, 0), *(pytest.param(24, s, marks=pytest.mark.full) for s in range(4))]
)
def test_a_day_has_no_drift_and_no_oscillation(hours: int, seed: int) -> None:
    server, budget = Server(), 1e9
    day = simulate(server, hours=hours, budget=budget, seed=seed)
    assert day.broken == 0, "a layer has as many hot experts as slots, always"
    assert day.pairs.sum() == day.routed, "every pair once"
    assert (day.moved == 2 * server.nbytes * day.swaps).all()
    assert day.moved.max() <= budget * (HOUR + 1)
    assert day.returns.sum() <= 0.02 * day.swaps.sum()
    busy = day.pairs > day.pairs.max() / 20
    busy[0] = False  # it begins with experts that nobody has chosen
    assert (day.hits[busy] >= 0.95 * day.optimum[busy]).all()
    fast = 64 * server.experts / server.top_k
    most = server.layers * server.hot * day.tokens / fast
    assert (day.swaps <= 0.25 * most + server.layers * server.hot).all()
