"""Decides, layer by layer of a step, where the experts are computed that are not on the GPU.

For each cold expert that the batch meets: the CPU computes it now, or its weights are copied and
the GPU computes it, or the CPU computes it later, for the sum of the next layer. The routing of
later layers is not known yet, so they are taken to be like in the last steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.schedule.choice_search import (
    COUNT,
    DEFERRABLE,
    WAS_DEFERRED,
    WAS_SENT,
    compiled_search,
    orders,
)
from hybrid_moe.schedule.layer_demand import LayerDemand
from hybrid_moe.schedule.layer_step import START, Floats, compiled_advance, constants_of, costs_of
from hybrid_moe.schedule.layer_work import LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

AHEAD = 2
"""Layers behind the one that is decided. What it defers ends in the first; what that must defer in
turn, in the second."""

REMEMBERED = 5
"""Steps: the one that is decided, and those before it, which its later layers are taken to be
like."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LayerChoice:
    """What is done with the cold experts of a layer.

    Attributes:
        layer: its number.
        cpu, sent, deferred: ids of experts, each expert in one of them.
        seconds: of this layer by the model, from its start until its sum is complete.
        all_on_cpu: the same where nothing is sent or deferred.
        ahead: seconds that the choice gains until the layers are over that were looked at.
    """

    layer: int
    cpu: Ids
    sent: Ids
    deferred: Ids
    seconds: float
    all_on_cpu: float
    ahead: float

    def explain(self) -> str:
        """One line for the trace."""
        count = len(self.cpu) + len(self.sent) + len(self.deferred)
        what = [f"{len(self.sent)} sent"] if self.sent else []
        what += [f"{len(self.deferred)} deferred"] if self.deferred else []
        chosen = f"{' and '.join(what) or 'none sent or deferred'} of {count} cold experts"
        return (
            f"layer {self.layer}: {chosen}: {self.seconds * 1e6:.0f} us, all on the CPU "
            f"{self.all_on_cpu * 1e6:.0f} us, gains {self.ahead * 1e6:.0f} us by the layers after"
        )


class StepScheduler:
    """Decisions for the layers of one model, step after step of batches of like sizes: batches of
    other sizes have schedulers of their own. Not for several threads.

    Attributes:
        rates: of the machine; they may change from one decision to the next.
    """

    def __init__(
        self,
        works: Sequence[LayerWork],
        rates: MachineRates,
        *,
        max_deferred: int = 0,
        send: bool = True,
    ) -> None:
        """
        Args:
            works: the layers that have experts, in order.
            rates: of the machine.
            max_deferred: experts of a token that may be deferred; 0 keeps results exact.
            send: whether experts may be sent; without a link they never are.

        Raises:
            ValueError: no layers, one without experts, or a negative `max_deferred`.
        """
        if not works or any(work.expert is None for work in works):
            raise ValueError("a scheduler needs layers, each with experts")
        if max_deferred < 0:
            raise ValueError(f"max_deferred is {max_deferred}, must be 0 or more")
        self.works, self.rates, self.max_deferred = tuple(works), rates, max_deferred
        self._send = send and rates.link > 0
        self._search, self._advance = compiled_search(), compiled_advance()
        self._layers = np.zeros((REMEMBERED, len(works), 7))
        self._asked = np.zeros((REMEMBERED, len(works), 8))
        self._steps = 0
        self._state = START
        self._next = 0

    @property
    def seconds(self) -> float:
        """Of the step so far, by the model."""
        return self._state[0]

    def decide(
        self,
        demand: LayerDemand,
        work: LayerWork | None = None,
        *,
        place: int | None = None,
        room: int | None = None,
    ) -> LayerChoice:
        """The choice for the next layer; after the last one comes the first of the next step.

        Args:
            demand: what the batch meets.
            work: of this step, where the amounts before the experts depend on it.
            place: of the layer, where that may be another than the next one: the step is taken to
                begin there.
            room: experts that may be sent; None for any number.
        """
        if place is None:
            place = self._next
        if place == 0 or place != self._next:
            self._state = START
        work = work or self.works[place]
        last = place == len(self.works) - 1
        layer = constants_of(work, demand, self.rates)
        costs = costs_of(work, demand.tokens, self.rates)
        send, defer = orders(
            costs,
            demand.weight,
            demand.deferrable,
            can_send=self._send,
            can_defer=self.max_deferred > 0 and not last,
        )
        send = send[:room]
        ahead, asked = self._behind(place, layer, demand, costs)
        sent, deferred, best, plain = self._search(
            self._state, layer, costs, send, defer, ahead, asked, self._send
        )
        is_sent = np.zeros(len(costs), bool)
        is_sent[send[:sent]] = True
        is_later = np.zeros(len(costs), bool)
        is_later[[e for e in defer if not is_sent[e]][:deferred]] = True
        after = self._advance(self._state, layer, _part(costs, is_sent, is_later))
        no = np.zeros(len(costs), bool)
        alone = self._advance(self._state, layer, _part(costs, no, no))
        choice = LayerChoice(
            work.layer,
            _ids(demand, ~(is_sent | is_later)),
            _ids(demand, is_sent),
            _ids(demand, is_later),
            after[0] - self._state[0],
            alone[0] - self._state[0],
            float(plain - best),
        )
        row = self._steps % REMEMBERED
        self._layers[row, place] = layer
        self._asked[row, place] = _asked(demand, costs, sent, deferred)
        self._steps += last
        self._state, self._next = after, 0 if last else place + 1
        return choice

    def _behind(
        self, place: int, layer: Floats, demand: LayerDemand, costs: Floats
    ) -> tuple[Floats, Floats]:
        """The layers after `place` as they were in the last steps; in the first step like this one,
        with all on the CPU. The last one defers nothing."""
        end = min(place + 1 + AHEAD, len(self.works))
        known = [n for n in range(self._steps - REMEMBERED + 1, self._steps) if n >= 0]
        rows = [n % REMEMBERED for n in known]
        ahead, asked = self._layers[rows, place + 1 : end], self._asked[rows, place + 1 : end]
        if not rows:
            ahead = np.tile(layer, (1, end - place - 1, 1))
            asked = np.tile(_asked(demand, costs, 0, 0), (1, end - place - 1, 1))
        if end == len(self.works):
            asked[:, -1:, DEFERRABLE] = asked[:, -1:, WAS_DEFERRED] = 0
        return ahead, asked


def _asked(demand: LayerDemand, costs: Floats, sent: int, deferred: int) -> Floats:
    """What `choice_search` calls what a layer asked for."""
    asked = np.zeros(8)
    asked[COUNT], asked[DEFERRABLE] = len(costs), demand.deferrable.sum()
    asked[WAS_SENT], asked[WAS_DEFERRED] = sent, deferred
    asked[4:] = costs.mean(0) if len(costs) else 0.0
    return asked


def _part(
    costs: Floats,
    sent: npt.NDArray[np.bool_],
    later: npt.NDArray[np.bool_],
) -> Floats:
    """What `layer_step` calls a part."""
    now = costs[~(sent | later), :2].sum(0)
    return np.concatenate(
        [now, costs[later, :2].sum(0), [float(sent.sum())], costs[sent, 2:].sum(0)]
    )


def _ids(demand: LayerDemand, which: npt.NDArray[np.bool_]) -> Ids:
    return tuple(demand.experts[which].tolist())
