"""How many experts are sent: against every other number, and against every other set."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, PrefillTimes
from hybrid_moe.schedule.learned_rates import LearnedFactor
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.prefill_planner import PrefillPlanner

NBYTES, WEIGHTS = 8e6, 16e6
FORMATS = ("MXFP4", "MXFP4")


def machine(read: float = 80e9, link: float = 20e9, flops: float = 100e12) -> MachineRates:
    return MachineRates(read, 800e9, flops, link, submit=20e-6, back=10e-6)


def planner(rates: MachineRates | None = None, macs: float = 0.8e12) -> PrefillPlanner:
    return PrefillPlanner(rates or machine(), macs / 2, macs)


def load(
    pairs: list[int], *, room: int | None = None, on_gpu: PairCount | None = None
) -> PrefillLoad:
    cold = np.array(sorted(pairs, reverse=True), np.int64)
    gpu = on_gpu or PairCount(0, 0)
    most = len(cold) if room is None else room
    return PrefillLoad(3, FORMATS, int(NBYTES), int(WEIGHTS), cold, gpu, most)


def cpu_time(pairs: list[int], rates: MachineRates, macs: float = 0.8e12) -> float:
    """As the module's text says, written anew."""
    if not pairs:
        return 0.0
    reading = len(pairs) * NBYTES / rates.cpu_read
    first, more = len(pairs) * WEIGHTS / (macs / 2), (sum(pairs) - len(pairs)) * WEIGHTS / macs
    return rates.submit + max(reading, first + more) + rates.back


def gpu_time(experts: float, pairs: float, rates: MachineRates) -> float:
    return max(experts * NBYTES / rates.gpu_read, 2 * pairs * WEIGHTS / rates.gpu_flops)


def layer_time(
    sent: list[int], rest: list[int], here: PairCount, behind: float, rates: MachineRates
) -> float:
    arrival = behind + len(sent) * NBYTES / rates.link
    gpu = max(gpu_time(*here, rates), arrival) + gpu_time(len(sent), sum(sent), rates)
    return max(cpu_time(rest, rates), gpu)


LISTS = st.lists(st.integers(1, 3000), min_size=0, max_size=24)


@settings(max_examples=80, deadline=None)
@given(
    now=LISTS,
    then=st.one_of(st.none(), LISTS),
    room=st.integers(0, 24),
    hot=st.integers(0, 5000),
    queued=st.floats(0, 40 * NBYTES),
    before=st.floats(0, 5e-3),
    link=st.sampled_from([5e9, 20e9, 60e9]),
)
def test_no_other_number_is_better(
    now: list[int],
    then: list[int] | None,
    room: int,
    hot: int,
    queued: float,
    before: float,
    link: float,
) -> None:
    rates = machine(link=link)
    plan = planner(rates)
    plan.before = before
    here = PairCount(math.ceil(hot / 1000), hot)
    this = load(now, room=room, on_gpu=here)
    following = None if then is None else load(then, room=room)
    choice = plan.choose(this, following, queued)
    now, then_list = this.cold.tolist(), [] if following is None else following.cold.tolist()

    def total(late: int, ahead: int) -> float:
        behind = queued / link
        end = layer_time(now[:late], now[late:], here, behind, rates)
        if following is None:
            return end
        arrival = behind + late * NBYTES / link - end - before
        ahead_sent = then_list[:ahead], then_list[ahead:]
        return end + layer_time(*ahead_sent, PairCount(0, 0), arrival, rates)

    assert choice.late <= min(len(now), room) and choice.ahead <= min(len(then_list), room)
    best = min(
        total(late, ahead)
        for late in range(min(len(now), room) + 1)
        for ahead in range(min(len(then_list), room, max(0, room - late)) + 1)
    )
    assert total(choice.late, choice.ahead) <= 1.01 * best + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=9), st.sampled_from([5e9, 20e9, 60e9]))
def test_no_other_set_is_better(pairs: list[int], link: float) -> None:
    """Of all sets of experts, those with most pairs, where the GPU's time is next to nothing."""
    rates = machine(link=link, flops=1e16)
    chosen = planner(rates).choose(load(pairs), None, 0.0).late
    ordered = sorted(pairs, reverse=True)
    mine = layer_time(ordered[:chosen], ordered[chosen:], PairCount(0, 0), 0.0, rates)
    best = min(
        layer_time(
            [ordered[at] for at in subset],
            [n for at, n in enumerate(ordered) if at not in subset],
            PairCount(0, 0),
            0.0,
            rates,
        )
        for count in range(len(ordered) + 1)
        for subset in itertools.combinations(range(len(ordered)), count)
    )
    assert mine <= best * 1.001


def test_a_link_that_is_no_faster_than_nothing_carries_nothing() -> None:
    rates = machine(link=1e6)
    choice = planner(rates).choose(load([10] * 8), load([10] * 8), 0.0)
    assert choice[:2] == (0, 0)
    assert choice.why["GPU"] == 0 and choice.why["CPU"] > 0


def test_what_is_measured_counts() -> None:
    """A machine that is told wrongly: the CPU takes twice as long, the link half. After some layers
    the choice is that of who knew."""
    told, true = machine(), machine(read=40e9, link=40e9)
    plan, knows = planner(told), planner(true, 0.4e12)
    pairs = [50 * n for n in range(1, 33)]
    for _ in range(12):
        this = load(pairs)
        sent = plan.choose(this, load(pairs), 0.0).late
        rest = this.cold.tolist()[sent:]
        cpu = cpu_time(rest, true, 0.4e12) - true.submit - true.back if rest else None
        plan.note(PrefillTimes(this, sent, 1e-3, cpu, None))
        plan.note_link(int(NBYTES) * 4, 4 * NBYTES / true.link)
    knows.before = plan.before
    assert plan.before == pytest.approx(1e-3)
    assert plan.cpu[FORMATS].value == pytest.approx(2)
    assert plan.link.value == pytest.approx(0.5)
    assert (
        plan.choose(load(pairs), load(pairs), 0.0)[:2]
        == knows.choose(load(pairs), load(pairs), 0.0)[:2]
    )


def test_what_is_not_known_changes_nothing() -> None:
    plan = planner()
    plan.note(PrefillTimes(load([100] * 8), 0, None, None, None))
    plan.note(PrefillTimes(load([100] * 8), 8, None, 0.0, None))  # the CPU had no part
    assert not plan.cpu and not plan.gpu.known and plan.before == 0


def test_a_factor_is_a_mean_of_logarithms() -> None:
    factor = LearnedFactor()
    factor.learn(4.0)
    assert factor.value == 4
    factor.learn(0.25)
    assert factor.value == pytest.approx(4 * (1 / 16) ** 0.3)


def test_no_link() -> None:
    with pytest.raises(ValueError, match="needs a link"):
        PrefillPlanner(MachineRates(1e9, 1e9, 1e12), 1e9, 1e9)
