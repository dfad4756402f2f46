"""When a step is decided, and by which rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, PrefillTimes
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.layer_work import GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.step_planner import LONGEST_REST, StepCourse, StepPlanner
from hybrid_moe.schedule.step_scheduler import LayerChoice, StepScheduler
from tests.hybrid_moe.schedule.cases import work
from tests.hybrid_moe.schedule.test_decisions import known_demand

FORMATS = ("MXFP4", "MXFP4")
NBYTES, WEIGHTS = 13_400_000, 25_200_000
RATES = MachineRates(cpu_read=50e9, gpu_read=1e15, gpu_flops=1e18, link=25e9)


def planner(rates: MachineRates = RATES) -> StepPlanner:
    return StepPlanner(rates, 1e18, 1e18)


def decide(steps: StepPlanner, ids: list[int], *, room: int = 99, **routing: Any) -> LayerChoice:
    """For one token that takes `ids`, of which all are cold."""
    cold, count = np.ones(len(ids), np.int64), len(ids)
    load = PrefillLoad(7, FORMATS, NBYTES, WEIGHTS, cold, PairCount(0, 0), room)
    scores = np.linspace(1, 0.5, count)[None].astype(np.float32)
    facts = {"most_deferred": 0, "place": 0, "layers": 1, **routing}
    routed = StepRouting(np.array([ids]), scores, np.zeros(16, bool), **facts)
    return steps.choose(load, routed)


def measured(seconds: float, ids: int, sent: int = 0) -> PrefillTimes:
    load = PrefillLoad(7, FORMATS, NBYTES, WEIGHTS, np.ones(ids, np.int64), PairCount(0, 0), 99)
    return PrefillTimes(load, sent, None, seconds, None)


def steps_asked(course: StepCourse, count: int, gained: float) -> list[int]:
    """Which of so many steps of three layers are decided, where each gains this at a cost of 1."""
    found = []
    for step in range(count):
        answers = {course.asks(layer) for layer in (2, 5, 9)}
        assert len(answers) == 1, "layers of a step get the same answer"
        if answers == {True}:
            found.append(step)
            course.gained, course.took = gained, 1.0
    return found


def test_steps_rest_while_nothing_is_gained() -> None:
    assert steps_asked(StepCourse(), 20, gained=2.0) == list(range(20))
    course = StepCourse()
    assert steps_asked(course, 40, gained=0.5) == [0, 2, 6, 14, 30]
    far = steps_asked(course, 20 * LONGEST_REST, gained=0.5)
    assert set(np.diff(far[-5:])) == {LONGEST_REST + 1}
    again = steps_asked(course, 3 * LONGEST_REST, gained=2.0)
    assert again == list(range(again[0], 3 * LONGEST_REST)), "the machine has changed"


def test_a_layer_that_comes_again_begins_a_step() -> None:
    course = StepCourse()
    assert course.asks(4)
    course.took = 1.0
    assert not course.asks(4)
    assert course.asks(4)


def test_batches_of_other_sizes_have_courses_of_their_own() -> None:
    steps = planner(MachineRates(cpu_read=1e15, gpu_read=1e15, gpu_flops=1e18, link=1e6))
    assert steps.asks(7, 1)
    assert not decide(steps, [1, 2, 3]).sent
    steps.spent(1, 1e-4)
    assert not steps.asks(7, 1)
    assert steps.asks(7, 2) and steps.asks(7, 40)


def test_the_choice_is_the_schedulers() -> None:
    """A link half as fast as memory: of nine experts the CPU keeps six."""
    scheduler = StepScheduler([LayerWork(0, GpuAmount(), expert=work().expert)], RATES)
    expected = scheduler.decide(known_demand(9))
    choice = decide(planner(), list(range(9)))
    assert choice.sent == expected.sent == (0, 1, 2) and choice.layer == 7
    assert choice.seconds == pytest.approx(6 * NBYTES / 50e9, rel=1e-3)
    assert decide(planner(), list(range(9)), room=2).sent == (0, 1)
    assert decide(planner(), list(range(9)), room=0).sent == ()


def test_what_is_learned_is_decided_by() -> None:
    """A CPU that is five times as fast as it was said to be needs no help; one whose link is slower
    sends less; a GPU that takes long computes nothing that it does not have to."""
    fast, busy, slow = planner(), planner(), planner()
    fast.note(measured(9 * NBYTES / 50e9 / 20, 9))
    assert decide(fast, list(range(9))).sent == ()
    slow.note_link(NBYTES, NBYTES / 10e9)
    assert decide(slow, list(range(9))).sent == (0,)
    load = PrefillLoad(7, FORMATS, NBYTES, WEIGHTS, np.ones(0, np.int64), PairCount(1, 1), 99)
    busy.note(PrefillTimes(load, 0, None, None, 1.0))
    assert decide(busy, list(range(9))).sent == ()


def test_attention_is_learned_and_deferral_fills_it() -> None:
    """As long as an expert takes, between two layers: then one of the four runs under it."""
    rates = MachineRates(cpu_read=50e9, gpu_read=1e15, gpu_flops=1e18, link=1.0)
    steps = planner(rates)
    times = measured(4 * NBYTES / 50e9, 4)
    steps.note(PrefillTimes(times.load, 0, NBYTES / 50e9, times.cpu, None))
    depth = {"most_deferred": 3, "layers": 6}
    for _ in range(3):
        choices = [decide(steps, [0, 1, 2, 3], place=at, **depth) for at in range(6)]
    assert [choice.deferred for choice in choices] == [(3,)] * 5 + [()]
    exact = [decide(steps, [0, 1, 2, 3], place=at, layers=6) for at in range(6)]
    assert not any(choice.deferred for choice in exact)


def test_a_step_may_begin_anywhere() -> None:
    """Layers that are left out, and steps that were given up: what came before is over."""
    scheduler = StepScheduler([work(n) for n in range(4)], RATES)
    demand = demand_of([[0, 1, 2]], [[1.0, 1.0, 1.0]], np.zeros(8, bool))
    first = scheduler.decide(demand, place=0)
    assert scheduler.seconds == pytest.approx(first.seconds)
    for place in (2, 3, 1, 1, 0):
        choice = scheduler.decide(demand, place=place)
    assert scheduler.seconds == pytest.approx(choice.seconds) == pytest.approx(first.seconds)


def test_no_link() -> None:
    with pytest.raises(ValueError, match="needs a link"):
        planner(MachineRates(1, 1, 1))
