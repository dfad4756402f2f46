"""What a planner of short batches is told, and what it answers. No tensors here.

Of a long batch only how many tokens each expert has is counted (`prefill_loads`). Of a short one
everything is known: which token takes which expert, and with what weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes


@dataclass(frozen=True, eq=False)
class StepRouting:
    """A short batch at one of a model's layers.

    Attributes:
        ids: int64 [T, k]. scores: float32 [T, k], routing weights.
        not_cold: bool [E], experts that the CPU does not compute.
        most_deferred: experts of a token that may be computed one layer later.
        place, layers: the layer is one of so many, in their order.
    """

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    not_cold: npt.NDArray[np.bool_]
    most_deferred: int
    place: int
    layers: int


class StepChoice(Protocol):
    """Where a layer's cold experts are computed: `schedule.step_scheduler.LayerChoice`."""

    @property
    def sent(self) -> tuple[int, ...]:
        """Ids of the experts that travel."""

    @property
    def deferred(self) -> tuple[int, ...]:
        """Ids of those that the CPU computes for the sum of the next layer."""

    def explain(self) -> str:
        """One line for the trace."""


class BatchPlanner(Protocol):
    """Decides for short batches. `schedule.step_planner` has one."""

    def asks(self, layer: int, tokens: int) -> bool:
        """Whether a batch of so many tokens is to be decided at all; costs next to nothing. Layers
        of one step get the same answer."""

    def choose(self, load: PrefillLoad, routing: StepRouting) -> StepChoice:
        """Decide; `load.room` experts may be sent."""

    def spent(self, tokens: int, seconds: float) -> None:
        """The host was so long at the latest choice, for so many tokens, and at carrying it out."""

    def note(self, times: PrefillTimes) -> None:
        """Learn from a layer that is over."""

    def note_link(self, nbytes: int, seconds: float) -> None:
        """Learn from copies that took so long."""
