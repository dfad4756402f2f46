"""The experts that one batch of one layer has in transient slots, and how long the batch took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.trace_file import TraceNote
from hybrid_moe.runtime.gpu_faults import explained
from hybrid_moe.runtime.hot_half import entered
from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes
from hybrid_moe.runtime.transient_slots import TransientSlots, Wave
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.link import Anchor


class Stopwatch:
    """Moments of the calling thread, or of a GPU's stream.

    Args:
        stream: None for the calling thread.
    """

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def now(self, stream: Stream | None = None) -> Any:
        """This moment, in the order of `stream` or of the one that the watch was made for."""
        if self._stream is None:
            return time.monotonic_ns()
        return (stream or self._stream).record(timed=True)

    def over(self, moment: Any) -> bool:
        """Whether it has come."""
        return self._stream is None or self._stream.passed(moment)

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two that have come."""
        if self._stream is None:
            return (int(end) - int(begin)) / 1e9
        return self._stream.seconds_between(begin, end)

    def nanoseconds(self, moment: Any, anchor: Anchor | None) -> int:
        """As `time.monotonic_ns`, of a moment that has come; by the anchor on a stream."""
        if self._stream is None:
            return int(moment)
        assert anchor is not None
        return anchor[1] + round(1e9 * self._stream.seconds_between(anchor[0], moment))


class Learner(Protocol):
    """A planner, as far as it learns."""

    def note(self, times: PrefillTimes) -> None:
        """Of a batch that is over."""


@dataclass(eq=False)
class SentExperts:
    """See the module.

    Attributes:
        load: what the planner was told. sent: of its cold experts, the first so many were sent.
        planner: learns from the batch.
        watch: of the batch's stream.
        before: when the layer before was over, by a watch of the same kind; None: not known.
        slots: where the experts are.
        waves: each with the slots of the experts that the batch uses.
        wide: int32 [E], see `SlotExperts.wide`.
        jobs: that the CPU's part is made of.
        busy: see `ExpertLayer.busy`.
    """

    load: PrefillLoad
    sent: int
    planner: Learner
    watch: Stopwatch
    before: Any
    slots: TransientSlots
    waves: list[tuple[Wave, dict[int, int]]]
    wide: npt.NDArray[np.int32]
    jobs: int
    busy: Callable[[], tuple[int, int]]
    submitted: Any = None
    _busy_before: tuple[int, int] = (0, 0)
    _gpu: list[tuple[Any, Any, str | None]] = field(default_factory=list)
    _over: Any = None

    def compute(
        self,
        stream: Stream | None,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor | None:
        """What the experts give, when they have arrived: float32 [T, H]; None without any. Their
        slots are free for others then.

        Args:
            stream: in whose order; None on CPU tensors: now.
            hidden: bf16 [T, H]. ids: [T, k]. weights: float [T, k].
        """
        total: torch.Tensor | None = None
        if any(slot_of for _, slot_of in self.waves):
            with entered(stream):
                ids, x = ids.contiguous(), hidden.resolve_neg().contiguous()
                weights = weights.resolve_neg().to(torch.float32).contiguous()
        while self.waves:
            wave, slot_of = self.waves[0]
            if slot_of:
                wave.transfer.wait(stream)
                begin = self.watch.now()
                part = self._sums(stream, x, ids, weights, slot_of)
                with entered(stream):
                    total = part if total is None else total.add_(part)
                self._gpu.append((begin, self.watch.now(), wave.flow))
            del self.waves[0]
            self.slots.give_back(wave, None if stream is None else stream.record())
        return total

    def _sums(
        self,
        stream: Stream | None,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        slot_of: dict[int, int],
    ) -> torch.Tensor:
        table: npt.NDArray[np.int32] = np.full(len(self.wide), -1, np.int32)
        wide: npt.NDArray[np.int32] = np.zeros(self.slots.count, np.int32)
        for expert, slot in slot_of.items():
            table[expert], wide[slot] = slot, self.wide[expert]
        with explained(self.load.layer, x.device):
            return self.slots.sums(
                stream, x, ids, weights, torch.from_numpy(table), torch.from_numpy(wide)
            )

    def drop(self) -> None:
        """Free the slots of waves that nothing will be computed with."""
        while self.waves:
            self.slots.give_back(self.waves.pop()[0], None)

    def note_gpu(self, begin: Any) -> None:
        """The GPU has been at the layer's experts since `begin`."""
        self._gpu.append((begin, self.watch.now(), None))

    def note_submitted(self) -> None:
        """All is decided: the halves begin. No job of the layer is under way."""
        self._busy_before, self.submitted = self.busy(), self.watch.now()

    def note_over(self, stream: Stream | None) -> Any:
        """The layer's sum is there: the moment."""
        self._over = self.watch.now(stream)
        return self._over

    def times(self) -> PrefillTimes | None:
        """How long the batch took; None until it is over."""
        watch, over = self.watch, self._over
        if over is None or not watch.over(over):
            return None
        (first, busy_before), (last, busy) = self._busy_before, self.busy()
        # other batches of the layer, such as a step of decode, may have come since
        alone = last - first == self.jobs
        return PrefillTimes(
            self.load,
            self.sent,
            None if self.before is None else watch.seconds(self.before, self.submitted),
            (busy - busy_before) / 1e9 if alone else None,
            sum(watch.seconds(begin, end) for begin, end, _ in self._gpu),
        )

    def trace(self, anchor: Anchor | None) -> None:
        """Note what the GPU did, of a batch that is over, and how long its sum took."""
        layer, watch = self.load.layer, self.watch
        rest = len(self.load.cold) - self.sent
        whole = f"layer {layer}: {rest} on the CPU"
        spans: list[tuple[Any, Any, str, str, str | None]] = [
            (self.submitted, self._over, "layers", whole, None)
        ]
        for begin, end, flow in self._gpu:
            name = "in slots" if flow is None else "sent"
            spans.append((begin, end, "GPU", f"layer {layer}: experts {name}", flow))
        for begin, end, row, name, flow in spans:
            at = watch.nanoseconds(begin, anchor), watch.nanoseconds(end, anchor)
            trace.note(TraceNote(row, name, *at, flow=flow))
