"""A gate that learns how long steps are, by clocks that only count."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.schedule.draft_gate import BUDGET, FIRST_STEPS, PLAIN_AFTER, PROBE_AFTER
from hybrid_moe.schedule.measured_gate import FIRST_MEASURED, MeasuredGate


def run(
    gate: MeasuredGate, real: Callable[[int], float], steps: int, chance: float, seed: int = 0
) -> tuple[float, int, list[int]]:
    """(Seconds, tokens, lengths of drafts) of so many steps that take what `real` says."""
    rng = random.Random(seed)
    seconds, tokens, lengths = 0.0, 0, []
    for _ in range(steps):
        drafted = gate.length
        accepted = 0
        while accepted < drafted and rng.random() < chance:
            accepted += 1
        gate.note(drafted, accepted, real(drafted))
        seconds, tokens = seconds + real(drafted), tokens + 1 + accepted
        lengths.append(drafted)
    return seconds, tokens, lengths


def test_nothing_is_drafted_before_a_step_has_been_measured() -> None:
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 4)
    _, _, lengths = run(gate, lambda drafted: 0.02, FIRST_MEASURED + 1, 1.0)
    assert lengths == [0] * FIRST_MEASURED + [4]


def test_one_slow_step_in_the_beginning_does_not_count() -> None:
    gate = MeasuredGate(lambda tokens: 1.0, 0.0, 1)
    for seconds in (9.0, 0.02, 0.021):
        gate.note(0, 0, seconds)
    assert gate.gate is not None and gate.gate.seconds(0) == 0.021


@settings(max_examples=60)
@given(
    st.floats(1e-3, 10), st.floats(0, 1), st.floats(0, 3), st.floats(0, 3), st.integers(1, 8),
    st.floats(0, 1), st.integers(0, 1000),
)  # fmt: skip
def test_a_wrong_timeline_costs_one_draft_more(
    plain: float, slope: float, truth: float, draft: float, most: int, chance: float, seed: int
) -> None:
    """What a draft can lose beyond the account is what its first one takes longer than predicted:
    the account is below zero then, and there is none until it is not."""
    gate = MeasuredGate(lambda tokens: 1 + (tokens - 1) * slope, 0.0, most)

    def real(drafted: int) -> float:
        return plain * (1 + drafted * (truth + draft))

    seconds, tokens, _ = run(gate, real, 300, chance, seed)
    overrun = most * (truth + draft)
    assert seconds <= plain * (tokens * (1 + BUDGET) + FIRST_STEPS + overrun) * (1 + 1e-9)


def test_a_draft_that_is_always_wrong_is_not_asked_any_more() -> None:
    """Of 2000 steps those of the beginning, and one of each `PROBE_AFTER`."""
    gate = MeasuredGate(lambda tokens: 1 + 0.2 * (tokens - 1), 0.1, 8)
    _, _, lengths = run(gate, lambda drafted: 0.1 * (1 + 0.3 * drafted), 2000, 0.0)
    drafting = [step for step, length in enumerate(lengths) if length]
    # each step without a draft pays 1 % of itself, one drafted token takes 30 % of one: a probe
    # needs 30 steps, and so comes after `PROBE_AFTER`
    assert all(lengths[step] == 1 for step in drafting if step > 100)
    assert len([step for step in drafting if step > 100]) <= 1900 / PROBE_AFTER


def test_lengths_that_were_not_tried_follow_those_that_were() -> None:
    gate = MeasuredGate(lambda tokens: 1 + 0.5 * (tokens - 1), 0.0, 4)
    run(gate, lambda drafted: 2.0, FIRST_MEASURED, 0.0)
    inner = gate.gate
    assert inner is not None
    before = [inner.seconds(length) for length in range(5)]
    assert before == pytest.approx([2, 3, 4, 5, 6])
    gate.note(2, 2, 12.0)  # predicted was 4; half of the way to what was measured
    after = [inner.seconds(length) for length in range(5)]
    assert after == pytest.approx([2, 6, 8, 10, 12])
    gate.note(2, 2, None)
    assert [inner.seconds(length) for length in range(5)] == after


def test_a_machine_that_gets_faster_is_noticed() -> None:
    """The first steps were slow, for whatever reason: a draft that loses looks as if it saved,
    until a step without one is measured."""
    gate = MeasuredGate(lambda tokens: 1 + 0.9 * (tokens - 1), 0.0, 1)
    run(gate, lambda drafted: 10.0, FIRST_MEASURED, 0.0)
    _, _, lengths = run(gate, lambda drafted: 1 + 0.9 * drafted, 3000, 0.5)
    assert 0 in lengths[: PLAIN_AFTER + 1]
    late = lengths[-500:]
    assert sum(late) <= 500 / PROBE_AFTER + 1
