"""What a planner of streamed prefill is told, and what it answers. No tensors here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class PairCount(NamedTuple):
    """Experts that some token takes, and pairs of a token and one of them."""

    experts: float
    pairs: float


@dataclass(frozen=True, eq=False)
class PrefillLoad:
    """The experts of one layer that a chunk of a prompt takes.

    Attributes:
        layer: its index.
        formats: names of the formats of gate and up, and of down.
        nbytes: of one expert, as the CPU holds it and as the link carries it.
        weights: of one expert: multiply-accumulates for a token.
        cold: int64 [n], pairs of each used expert that is in the CPU's memory alone, most first.
        on_gpu: what the GPU computes anyway: experts in slots, or on their way to it.
        room: experts that can still be sent.
    """

    layer: int
    formats: tuple[str, str]
    nbytes: int
    weights: int
    cold: npt.NDArray[np.int64]
    on_gpu: PairCount
    room: int

    def split(self, sent: int) -> tuple[PairCount, PairCount]:
        """The first `sent` cold experts, and the others."""
        first, rest = self.cold[:sent], self.cold[sent:]
        return PairCount(len(first), int(first.sum())), PairCount(len(rest), int(rest.sum()))


@dataclass(frozen=True, eq=False)
class PrefillTimes:
    """How long a layer took.

    Attributes:
        load: with what. sent: of `load.cold`, the first so many went to the GPU.
        before: seconds from the sum of the layer before to this submission; None: not known.
        cpu: seconds that the pool was at the CPU's part, without hand-over; None: not known.
        gpu: seconds of the GPU's experts, without waiting for the link.
    """

    load: PrefillLoad
    sent: int
    before: float | None
    cpu: float | None
    gpu: float | None


class SendChoice(NamedTuple):
    """How many of the cold experts travel, those with most pairs first.

    Attributes:
        late: for the layer whose routing is known. ahead: for the one that follows.
        why: predicted seconds, for the trace.
    """

    late: int
    ahead: int = 0
    why: Mapping[str, float] = {}


class SendPlanner(Protocol):
    """Decides which experts travel. `schedule.prefill_planner` has one."""

    def choose(self, now: PrefillLoad, following: PrefillLoad | None, queued: float) -> SendChoice:
        """How many cold experts to send.

        Args:
            following: what is expected of it; None for the last layer.
            queued: bytes that the link has still to carry.
        """

    def note(self, times: PrefillTimes) -> None:
        """Learn from a layer that is over."""

    def note_link(self, nbytes: int, seconds: float) -> None:
        """Learn from copies that took so long."""
