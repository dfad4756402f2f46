"""Decisions for the short batches of a running model: `StepScheduler`, with rates that are learned.

Deciding and sending keeps the host for some 0.5 ms a layer, while nothing of the layer begins. So
steps are decided as long as the model says that it gains more than the clock says that it takes.
Where it does not, one step goes by undecided, then three, seven and so on, up to `LONGEST_REST`: a
machine whose CPU is always right is asked once in a thousand steps, and it is noticed when it is
not any more. Batches of like sizes are one course of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.layer_work import GpuAmount, LayerWork
from hybrid_moe.schedule.learned_rates import LearnedRates
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.step_scheduler import LayerChoice, StepScheduler

LONGEST_REST = 1023
"""Steps that go by undecided, at most."""


class StepCourse:
    """Steps of batches of like sizes, and whether the present one is decided."""

    def __init__(self) -> None:
        self.scheduler: StepScheduler | None = None
        self.gained = self.took = 0.0
        """Seconds of the present step's layers: by the model, and of the host."""
        self._decided = True
        self._rest = self._left = 0
        self._layer = -1

    def asks(self, layer: int) -> bool:
        """Whether the step is decided that has come to `layer`; a lower one begins another step."""
        if layer <= self._layer:
            self._begin()
        self._layer = layer
        return self._decided

    def _begin(self) -> None:
        if self.took:
            if self.gained > self.took:
                self._rest = 0
            else:
                self._rest = min(LONGEST_REST, 2 * self._rest + 1)
            self._left = self._rest
            self.gained = self.took = 0.0
        else:
            self._left -= 1
        self._decided = self._left <= 0


@dataclass
class StepPlanner(LearnedRates):
    """See the module. What it learns is of short batches: an expert of one token costs the CPU its
    bytes, one of a prompt its arithmetic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._courses: dict[int, StepCourse] = {}

    def asks(self, layer: int, tokens: int) -> bool:
        """See `runtime.step_choices.BatchPlanner.asks`."""
        return self._course(tokens).asks(layer)

    def choose(self, load: PrefillLoad, routing: StepRouting) -> LayerChoice:
        """See `runtime.step_choices.BatchPlanner.choose`."""
        course = self._course(len(routing.ids))
        rates, work = self._now(load)
        scheduler = course.scheduler
        if scheduler is None or len(scheduler.works) != routing.layers:
            works = [work] * routing.layers  # each decision brings its own
            scheduler = StepScheduler(works, rates, max_deferred=routing.ids.shape[1])
            course.scheduler = scheduler
        scheduler.rates = rates
        demand = demand_of(routing.ids, routing.scores, routing.not_cold, routing.most_deferred)
        choice = scheduler.decide(demand, work, place=routing.place, room=load.room)
        course.gained += choice.ahead
        return choice

    def spent(self, tokens: int, seconds: float) -> None:
        """See `runtime.step_choices.BatchPlanner.spent`."""
        self._course(tokens).took += seconds

    def _course(self, tokens: int) -> StepCourse:
        size = tokens.bit_length()
        course = self._courses.get(size)
        if course is None:
            course = self._courses[size] = StepCourse()
        return course

    def _now(self, load: PrefillLoad) -> tuple[MachineRates, LayerWork]:
        """The machine and a layer, by all that has been learned."""
        cpu, gpu, rates = self.cpu_factor(load.formats), self.gpu.value, self.rates
        rates = replace(
            rates,
            cpu_read=rates.cpu_read / cpu,
            gpu_read=rates.gpu_read / gpu,
            gpu_flops=rates.gpu_flops / gpu,
            link=rates.link / self.link.value,
            launch=max(0.0, self.before),
        )
        expert = replace(
            self.work(load),
            one_token_rate=self.one_token_rate / cpu,
            many_tokens_rate=self.many_tokens_rate / cpu,
        )
        return rates, LayerWork(load.layer, GpuAmount(), expert=expert)

    def prepare(self) -> None:
        """Compile the search now, which takes seconds, and not at the first step."""
        cold = np.ones(1, np.int64)
        load = PrefillLoad(0, ("", ""), 1, 1, cold, PairCount(0, 0), 1)
        ids, scores = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
        layers = 3
        for place in 2 * list(range(layers)):
            self.choose(load, StepRouting(ids, scores, np.zeros(1, np.bool_), 1, place, layers))
        self._courses.clear()
