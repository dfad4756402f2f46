"""Decisions of a layer against every other choice, and the optimum against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.schedule.layer_demand import LayerDemand
from hybrid_moe.schedule.layer_step import START, advance, compiled_advance, constants_of, costs_of
from hybrid_moe.schedule.layer_times import LayerTimes, layer_times
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertSplit, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.offline_optimum import MOST_PARTS, parts_of, shortest_step
from hybrid_moe.schedule.step_scheduler import LayerChoice, StepScheduler
from hybrid_moe.schedule.timeline import run_step
from tests.hybrid_moe.schedule.cases import RATES, demands, machines, work

CPU, SENT, LATER = range(3)


def split(demand: LayerDemand, where: tuple[int, ...]) -> ExpertSplit:
    """The experts of a demand, each where it says."""

    def count(place: int) -> ExpertCount:
        chosen = [t for t, w in zip(demand.tokens.tolist(), where, strict=True) if w == place]
        return ExpertCount(float(len(chosen)), float(sum(chosen)))

    return ExpertSplit(demand.hot, count(CPU), count(SENT), count(LATER))


def wheres(demand: LayerDemand, rates: MachineRates, *, last: bool) -> list[tuple[int, ...]]:
    """Every choice for the cold experts."""
    each = [
        [CPU, *([SENT] if rates.link else []), *([LATER] if deferrable and not last else [])]
        for deferrable in demand.deferrable.tolist()
    ]
    return list(itertools.product(*each))


def times(
    works: list[LayerWork],
    found: list[LayerDemand],
    rates: MachineRates,
    chosen: tuple[object, ...],
) -> list[LayerTimes]:
    pairs = zip(works, found, chosen, strict=True)
    return [layer_times(w, split(d, c), rates) for w, d, c in pairs]  # type: ignore[arg-type]


def of_choice(demand: LayerDemand, choice: LayerChoice) -> tuple[int, ...]:
    """Where a choice has each expert."""
    place = {
        **dict.fromkeys(choice.cpu, CPU),
        **dict.fromkeys(choice.sent, SENT),
        **dict.fromkeys(choice.deferred, LATER),
    }
    return tuple(place[expert] for expert in demand.experts.tolist())


@settings(max_examples=50)
@given(st.lists(demands(), min_size=1, max_size=4), machines(), st.data())
def test_compiled_layers_are_those_of_the_timeline(
    found: list[LayerDemand], rates: MachineRates, data: st.DataObject
) -> None:
    works = [work(n) for n in range(len(found))]
    chosen = tuple(
        data.draw(st.sampled_from(wheres(d, rates, last=n == len(found) - 1)))
        for n, d in enumerate(found)
    )
    state = plain = START
    for one, demand, where in zip(works, found, chosen, strict=True):
        costs = costs_of(one, demand.tokens, rates)
        at = np.array(where, int)
        part = np.concatenate(
            [costs[at == CPU, :2].sum(0), costs[at == LATER, :2].sum(0), [(at == SENT).sum()],
             costs[at == SENT, 2:].sum(0)]
        )  # fmt: skip
        layer = constants_of(one, demand, rates)
        state, plain = compiled_advance()(state, layer, part), advance(plain, layer, part)
    line = run_step(times(works, found, rates, chosen))
    assert state[0] == pytest.approx(line.seconds)
    assert state == plain


@settings(max_examples=12)
@given(
    st.lists(demands(2, 2), min_size=3, max_size=3)
    | st.lists(demands(3, 2), min_size=1, max_size=2),
    machines(),
)
def test_the_optimum_is_the_best_of_all_choices(
    found: list[LayerDemand], rates: MachineRates
) -> None:
    works = [work(n) for n in range(len(found))]
    every = itertools.product(
        *(wheres(d, rates, last=n == len(found) - 1) for n, d in enumerate(found))
    )
    best = min(run_step(times(works, found, rates, chosen)).seconds for chosen in every)
    assert shortest_step(works, found, rates) == pytest.approx(best)


@settings(max_examples=30)
@given(demands(5, 4), machines())
def test_a_single_layer_is_decided_as_well_as_possible(
    demand: LayerDemand, rates: MachineRates
) -> None:
    """Nothing can be deferred: what is left is which experts are sent."""
    scheduler = StepScheduler([work()], rates, max_deferred=2)
    choice = scheduler.decide(demand)
    assert not choice.deferred
    where = of_choice(demand, choice)
    seconds = layer_times(work(), split(demand, where), rates).alone
    assert choice.seconds == pytest.approx(seconds) == pytest.approx(scheduler.seconds)
    best = min(
        layer_times(work(), split(demand, other), rates).alone
        for other in wheres(demand, rates, last=True)
    )
    # less than a thousandth is not worth a choice, nor is it always seen which expert is best:
    # equal copies may have unequal arithmetic on the GPU
    assert seconds <= best * 1.002 + 1e-7
    assert choice.all_on_cpu >= choice.seconds - 1e-12


def known_demand(m: int, tokens: int = 1, deferrable: bool = True) -> LayerDemand:
    return LayerDemand(
        ExpertCount(0, 0), np.arange(m), np.full(m, tokens), np.linspace(0.1, 0.4, m),
        np.full(m, deferrable),
    )  # fmt: skip


def test_deferral_fills_the_time_of_attention_and_no_more() -> None:
    """Attention takes as long as one expert and hand-overs are free: of four experts one is
    deferred, the least weighted; the CPU never waits, and a second one would gain nothing."""
    rates = MachineRates(50e9, 500e9, 1e15)
    expert_seconds = 13.4e6 / 50e9
    attention = expert_seconds * 500e9
    works = [work(n, attention) for n in range(6)]
    works = [LayerWork(w.layer, w.before, expert=w.expert) for w in works]
    scheduler = StepScheduler(works, rates, max_deferred=3)
    for _ in range(3):
        choices = [scheduler.decide(known_demand(4)) for _ in works]
    assert [choice.deferred for choice in choices[:-1]] == [(0,)] * 5
    assert choices[-1].deferred == ()
    assert scheduler.seconds == pytest.approx((1 + 6 * 4) * expert_seconds)
    assert "1 deferred of 4 cold experts" in choices[0].explain()
    exact = StepScheduler(works, rates)
    assert all(not exact.decide(known_demand(4)).deferred for _ in works)
    assert exact.seconds == pytest.approx(6 * 5 * expert_seconds)


def test_experts_are_sent_until_the_link_takes_as_long() -> None:
    """A link half as fast as memory: of nine experts the CPU keeps six."""
    rates = MachineRates(50e9, 1e15, 1e18, link=25e9)
    scheduler = StepScheduler([work()], rates)
    choice = scheduler.decide(known_demand(9))
    assert (len(choice.cpu), len(choice.sent)) == (6, 3)
    assert choice.seconds == pytest.approx(6 * 13.4e6 / 50e9, rel=1e-3)
    assert "3 sent of 9 cold experts" in choice.explain()
    without = StepScheduler([work()], rates, send=False).decide(known_demand(9))
    assert not without.sent and without.seconds == without.all_on_cpu == choice.all_on_cpu
    assert "none sent or deferred of 9" in without.explain()


def test_experts_of_most_tokens_are_sent() -> None:
    slow = MachineRates(1e12, 1e15, 1e18, link=10e9)
    demand = LayerDemand(
        ExpertCount(0, 0),
        np.array([3, 5, 9]),
        np.array([10, 500, 40]),
        np.ones(3),
        np.zeros(3, bool),
    )
    assert StepScheduler([work()], slow).decide(demand).sent == (5,)


def test_what_cannot_be_decided_is_refused() -> None:
    dense = LayerWork(0, work().before)
    with pytest.raises(ValueError, match="needs layers, each with experts"):
        StepScheduler([work(), dense], RATES)
    with pytest.raises(ValueError, match="max_deferred is -1"):
        StepScheduler([work()], RATES, max_deferred=-1)
    many = LayerDemand(
        ExpertCount(0, 0), np.arange(40), np.arange(1, 41), np.ones(40), np.zeros(40, bool)
    )
    with pytest.raises(ValueError, match=rf"choices, more than {MOST_PARTS}"):
        parts_of(work(), many, RATES, send=True, defer=True)
    with pytest.raises(ValueError, match="layer 0 has no experts"):
        constants_of(dense, many, RATES)
