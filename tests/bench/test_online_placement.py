"""The benchmarks of online placement: what they measure is what online placement promises."""

from __future__ import annotations

import itertools

import idle_costs
import moving_day
import numpy as np
import pytest
from online_placement import SETTLED, TRACE, after_change, best, hit_rate
from traffic_day import HOUR, Day, Server, simulate

from hybrid_moe.cpu_kernels.use_counts import TOTALS


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
    """Of the best that does not move and knows what comes, for each pair of texts; and what moves
    after that costs less than one swap of a layer in a half-life of 256 tokens."""
    assert len(traces) == 3
    for one, other in itertools.permutations(traces, 2):
        change = after_change(traces[one], traces[other], hot=4)
        assert change.online >= 0.95 * change.optimum
        assert change.stays < change.online, "there is something to gain"
        assert change.swaps_settled < 4 * (len(traces[other]) - SETTLED) / 256


LONG = [pytest.param(24, seed, marks=pytest.mark.full) for seed in range(4)]


@pytest.mark.parametrize(("hours", "seed"), [(2, 0), *LONG])
def test_a_day_has_no_drift(hours: int, seed: int) -> None:
    """Topics come and go, and the placement is as good as the best that knows the hour and does not
    move, with a hundredth of the bytes that it may copy."""
    server, budget = Server(), 1e9
    day = simulate(server, hours=hours, budget=budget, seed=seed)
    check(day, server)
    assert (day.moved <= 0.01 * budget * HOUR).all()
    assert (day.hits >= 0.96 * day.optimum).all()


@pytest.mark.parametrize(("hours", "seed"), [(2, 1), *LONG])
def test_a_day_of_one_topic_has_no_oscillation(hours: int, seed: int) -> None:
    """Only experts at the edge, which are used alike, take turns now and then: less than one of a
    layer in two half-lives."""
    server = Server()
    day = simulate(server, topics=1, hours=hours, seed=seed)
    check(day, server)
    half_lives = day.tokens / (64 * server.experts / server.top_k)
    assert (day.swaps[1:] < server.layers * half_lives[1:] / 2).all()
    assert (day.hits >= 0.99 * day.optimum).all()


def check(day: Day, server: Server) -> None:
    """Nothing is lost: neither slots nor pairs nor bytes."""
    assert day.broken == 0, "a layer has as many hot experts as slots, always"
    assert day.pairs.sum() == day.routed, "every pair once"
    assert (day.moved == 2 * server.nbytes * day.swaps).all()


def test_real_layers_compute_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some minutes of a day, in which experts move; it would raise."""
    minutes = moving_day.batches(1, seed=0)
    monkeypatch.setattr(moving_day, "batches", lambda hours, seed: itertools.islice(minutes, 60))
    monkeypatch.setattr(moving_day, "HOUR", 60 * moving_day.STEP)
    (found,) = moving_day.day()
    assert found.report.swaps > 0
    assert found.report.pairs == found.tokens * moving_day.SERVER.top_k * moving_day.SERVER.layers


@pytest.mark.full
def test_a_day_on_real_layers_has_no_drift_of_memory() -> None:
    """From when the busiest batches have come: the interpreter has fewer blocks more than if each
    swap left one object behind, the process fewer bytes than if it left the expert."""
    hours = list(moving_day.day())
    warm, end = hours[7], hours[-1]
    swaps = end.report.swaps - warm.report.swaps
    assert swaps > 500
    assert end.blocks - warm.blocks < swaps
    nbytes = end.report.moved_bytes // (2 * end.report.swaps)
    assert end.resident - warm.resident < swaps * nbytes


def test_idle_costs_are_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_costs, "CALLS", 10)
    monkeypatch.setattr(idle_costs, "ROUNDS", 2)
    before = TOTALS.promotions, TOTALS.waits
    parts = idle_costs.measure(layers=2, experts=8, steps_per_second=20)
    assert (TOTALS.promotions, TOTALS.waits - 2 * 10) == before, "nothing has moved or waited"
    assert len(parts) == len({part.what for part in parts}) == 8
    assert all(part.us > 0 for part in parts)
