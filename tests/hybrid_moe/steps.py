"""A planner of short batches that decides by chance."""

from __future__ import annotations

import random

import numpy as np

from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.step_scheduler import LayerChoice


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
