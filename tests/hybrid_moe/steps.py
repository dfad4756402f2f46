"""Layers whose experts move, and planners that decide by chance or believe what they are told."""

from __future__ import annotations

import random

import numpy as np

from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.step_planner import StepPlanner
from hybrid_moe.schedule.step_scheduler import LayerChoice
from hybrid_moe.wrapper import KTMoEWrapper


def move(layer: KTMoEWrapper, expert: int) -> None:
    """Promote or demote an expert, if there is a place for it."""
    try:
        (layer.demote if layer.gpu_experts_mask[expert] else layer.promote)(expert)
    except RuntimeError as error:
        assert "slots are taken" in str(error) or "no place on the CPU" in str(error)


SLOW_CPU = MachineRates(cpu_read=1e3, gpu_read=1e12, gpu_flops=1e15, link=1e3)
"""An expert takes the CPU as long as the link, seconds: half of them are sent."""


class SurePlanner(StepPlanner):
    """Believes its rates, whatever is measured."""

    def note(self, times: PrefillTimes) -> None:
        assert 0 <= times.sent <= len(times.load.cold)

    def note_link(self, nbytes: int, seconds: float) -> None:
        assert nbytes > 0


def sure(rates: MachineRates) -> SurePlanner:
    """Arithmetic costs nothing."""
    planner = SurePlanner(rates, 1e18, 1e18)
    planner.prepare()
    return planner


class AnySteps:
    """Sends and defers whatever may be sent and deferred."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sent = self.deferred = self.noted = self.carried = 0

    def asks(self, layer: int, tokens: int) -> bool:
        return self.rng.random() < 0.8

    def choose(self, load: PrefillLoad, routing: StepRouting) -> LayerChoice:
        assert (np.diff(load.cold) <= 0).all() and (load.cold > 0).all()
        demand = demand_of(routing.ids, routing.scores, routing.not_cold, routing.most_deferred)
        assert load.cold.sum() == demand.tokens.sum() and load.on_gpu.pairs == demand.hot.pairs
        assert 0 <= routing.place < routing.layers
        cold = demand.experts.tolist()
        self.rng.shuffle(cold)
        sent = cold[: self.rng.randint(0, min(len(cold), load.room))]
        may = set(demand.experts[demand.deferrable].tolist()) if routing.most_deferred else set()
        later = [e for e in cold if e in may - set(sent) and self.rng.random() < 0.5]
        now = [e for e in cold if e not in (*sent, *later)]
        self.sent += len(sent)
        self.deferred += len(later)
        return LayerChoice(load.layer, tuple(now), tuple(sent), tuple(later), 0.0, 0.0, 0.0)

    def spent(self, tokens: int, seconds: float) -> None:
        assert tokens > 0 and seconds > 0

    def note(self, times: PrefillTimes) -> None:
        assert times.cpu is None or times.cpu >= 0
        self.noted += 1

    def note_link(self, nbytes: int, seconds: float) -> None:
        self.carried += nbytes
