"""Speculation that does not lose, whatever the texts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.schedule.draft_gate import BUDGET, FIRST_STEPS, DraftGate


def run(gate: DraftGate, steps: int, accepts: list[float], seed: int) -> tuple[float, int]:
    """(Seconds, tokens) of so many steps; the text changes its acceptance in equal parts."""
    rng = random.Random(seed)
    seconds, tokens = 0.0, 0
    for step in range(steps):
        chance = accepts[step * len(accepts) // steps]
        drafted = gate.length
        accepted = 0
        while accepted < drafted and rng.random() < chance:
            accepted += 1
        took = gate.seconds(drafted)
        gate.note(drafted, accepted, took)
        seconds, tokens = seconds + took, tokens + 1 + accepted
    return seconds, tokens


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(0, 6),
    st.integers(0, 1000),
)
def test_it_never_loses_more_than_its_budget(
    accepts: list[float], slope: float, draft: float, most: int, seed: int
) -> None:
    """A step of n tokens takes 1 + (n - 1) slope: from a step that reads all experts anyway to
    one that reads as many more for each token."""
    gate = DraftGate(lambda n: 1 + (n - 1) * slope, draft, most)
    seconds, tokens = run(gate, 300, accepts, seed)
    assert seconds <= tokens * (1 + BUDGET) + FIRST_STEPS + 1e-9


def test_it_drafts_where_that_pays() -> None:
    gate = DraftGate(lambda n: 1 + 0.1 * (n - 1), 0.05, 4)
    seconds, tokens = run(gate, 600, [0.9], 0)
    # a draft of 4: 1 + 0.9 + ... + 0.9^4 = 4.1 tokens in 1.6 steps
    assert gate.length == 4 and tokens / seconds > 0.9 * 4.0951 / 1.6
    assert gate.acceptance == pytest.approx(0.9, abs=0.15)


def test_it_stops_where_that_loses_and_comes_back() -> None:
    """One accepted token of two is not worth 0.8 steps; nine of ten are."""
    gate = DraftGate(lambda n: 1 + 0.8 * (n - 1), 0.0, 3)
    run(gate, 300, [0.3], 1)
    assert gate.length == 0
    seconds, tokens = run(gate, 3000, [0.95], 2)
    assert tokens / seconds > 1.05


def test_measured_times_replace_the_model_s() -> None:
    gate = DraftGate(lambda n: 1.0, 0.0, 1)
    for _ in range(200):
        gate.note(1, 1, 3.0)
    assert gate.seconds(1) == pytest.approx(3.0, rel=0.01) and gate.length == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="neither may be below 0"):
        DraftGate(lambda n: 1.0, -1.0, 1)
    with pytest.raises(ValueError, match="must be above 0"):
        DraftGate(lambda n: 0.0, 0.0, 1)
    gate = DraftGate(lambda n: float(n), 0.0, 2)
    for drafted, accepted in ((1, 2), (3, 0), (0, -1)):
        with pytest.raises(ValueError, match="drafted tokens were accepted"):
            gate.note(drafted, accepted)
