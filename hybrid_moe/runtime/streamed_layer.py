"""A layer of a `PrefillStream`: what it sends for a batch, and what the CPU's part goes by."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.placement_change import AWAY, COLD, HOT
from hybrid_moe.cpu_kernels.trace_file import TraceNote
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.hot_half import HotHalf
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, SendChoice
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.runtime.routing_reader import Counts, RoutingReader, pairs_of
from hybrid_moe.runtime.sent_experts import Learner, SentExperts, Stopwatch
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.runtime.transient_slots import TransientSlots, Wave
from hybrid_moe.streams.buffers import BUFFERS, BufferPool
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.staging import Stager


class StreamedLayer:
    """A loaded layer of a `PrefillStream`.

    Args:
        owner: the stream. layer, half, placement, shape: of the layer.
        pool: of pinned buffers.

    Attributes:
        skip: uint8 [E] CPU tensor: what the CPU's part of the latest batch goes by.
        stager: of its jobs on CUDA tensors.
    """

    def __init__(
        self,
        owner: PrefillStream,
        layer: ExpertLayer,
        half: HotHalf,
        placement: ExpertPlacement,
        shape: LayerShape,
        pool: BufferPool = BUFFERS,
    ) -> None:
        self._owner, self._layer, self._placement, self._shape = owner, layer, placement, shape
        self._device = half.device
        self._slots = owner.reserve(half)
        self.skip = torch.zeros(shape.num_experts, dtype=torch.uint8)
        self.stager = Stager(layer, self.skip, pool, torch.float32)
        self._ahead: list[Wave] = []  # the same object always
        weakref.finalize(self, _give_back, self._slots, self._ahead).atexit = False
        self._seen: tuple[int, Counts] | None = None
        self._reader = RoutingReader(shape.num_experts, shape.num_experts_per_tok)
        self._send_ahead: Callable[[], None] | None = None
        formats = layer.formats
        self._formats = formats.gate_up.name, formats.down.name
        owner.join(self)

    @property
    def index(self) -> int:
        """Of the layer in the model."""
        return self._shape.layer_idx

    @property
    def turn(self) -> ProcessLock:
        """To be held from `begin` until the batch's experts are computed: prompts of several
        threads share slots and link."""
        return self._owner.turn

    def wants(self, tokens: int, stream: Stream | None) -> bool:
        """Whether it is decided for a batch of so many tokens where its experts are computed.
        Nothing is under capture, where nobody can wait for the routing."""
        owner = self._owner
        if tokens < owner.tokens:
            steps = owner.steps
            if steps is None or not tokens or not steps.asks(self._shape.layer_idx, tokens):
                return False
        return stream is None or not stream.capturing()

    def begin(
        self,
        stream: Stream | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        most_deferred: int,
        settle: Callable[[Stream | None], None],
    ) -> StreamedBatch:
        """Decide where the experts of a batch are computed, and send those that go late; the
        calling thread waits for the routing. `skip` is set.

        Args:
            stream: that of the batch; None on CPU tensors.
            ids: integer [T, k]. weights: float [T, k].
            most_deferred: experts of a token that may be computed one layer later.
            settle: see `ExpertPlacement.promote`.
        """
        if len(ids) >= self._owner.tokens:
            return self._begin_prompt(stream, ids)
        return self._begin_step(stream, ids, weights, most_deferred, settle)

    def _begin_prompt(self, stream: Stream | None, ids: torch.Tensor) -> StreamedBatch:
        """How many travel late, and how many ahead for the next layer, says the planner of prompts.
        None is deferred: nearly every expert is protected by some token."""
        owner, tokens, begin = self._owner, len(ids), time.monotonic_ns()
        owner.learn()
        watch = Stopwatch(stream)
        counts = self._reader.count(stream, ids)
        self._anchor()
        self._seen = tokens, counts
        cold = self._cold
        used = cold & (counts > 0)
        waves = [(wave, {e: s for e, s in wave.slot_of.items() if used[e]}) for wave in self._ahead]
        self._ahead.clear()
        here = [e for _, slot_of in waves for e in slot_of]
        for wave, slot_of in waves:
            owner.unused_bytes += (len(wave.slots) - len(slot_of)) * self._nbytes
        following = owner.after(self.index)
        owner.reclaim((self, following))
        waiting = used.copy()
        waiting[here] = False
        order = _most_first(counts, waiting)
        on_gpu = (counts > 0) & (self._placement.hot | (used & ~waiting))
        load = self._load(counts[order], counts[on_gpu], self._slots.free)
        expected = None if following is None else following.expected(tokens)
        choice = owner.planner.choose(load, expected, owner.link(self._device).queued_bytes)
        now, ahead, _ = choice
        if trace.is_recording():
            self._trace_choice(begin, load, choice)
        self._send_ahead = None
        if following is not None and ahead:
            self._send_ahead = lambda: following.send_ahead(ahead)
        jobs = 1 if stream else -(-tokens // MAX_TOKENS_PER_JOB)
        sent = self._sent_experts(load, now, owner.planner, watch, waves, jobs)
        return self._started(sent, order[:now])

    def _begin_step(
        self,
        stream: Stream | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        most_deferred: int,
        settle: Callable[[Stream | None], None],
    ) -> StreamedBatch:
        """Which experts travel, to stay or for this batch alone, and which the CPU computes one
        layer later, says the planner of steps."""
        owner, begin = self._owner, time.monotonic_ns()
        assert owner.steps is not None
        owner.learn()
        self._send_ahead = None
        owner.reclaim(())  # what came ahead for a prompt that was given up would stay in its slots
        watch = Stopwatch(stream)
        chosen, scores = self._reader.read(stream, ids, weights)
        known = time.monotonic()
        self._anchor()
        counts, cold, room = pairs_of(chosen, self._shape.num_experts), self._cold, self._slots.free
        load = self._load(counts[_most_first(counts, cold)], self._hot_counts(counts), room)
        routing = StepRouting(chosen, scores, ~cold, most_deferred, *owner.place_of(self.index))
        choice = owner.steps.choose(load, routing)

        def swap(down: int, up: int) -> None:
            self._placement.demote(down, stream, settle)
            self._placement.promote(up, stream, settle)

        stay = owner.stays(self.index, choice.sent, swap)
        self._placement.check_mask()  # whole, and the caller's
        TOTALS.stays += len(stay)
        put_off = int(counts[list(choice.deferred)].sum())
        TOTALS.deferred_pairs += put_off
        travel = np.array([e for e in choice.sent if e not in stay], np.int64)
        if trace.is_recording():
            facts = {"sent": list(choice.sent), "to stay": list(stay), "pairs put off": put_off}
            now = time.monotonic_ns()
            trace.note(TraceNote("decisions", choice.explain(), begin, now, facts))
        rest = self._cold
        rest[travel] = False
        order = np.concatenate([travel, _most_first(counts, rest)])
        load = self._load(counts[order], self._hot_counts(counts), room)
        jobs = 2 if choice.deferred else 1
        sent = self._sent_experts(load, len(travel), owner.steps, watch, [], jobs)
        batch = self._started(sent, travel, choice.deferred)
        owner.steps.spent(len(ids), time.monotonic() - known)
        return batch

    def _sent_experts(
        self,
        load: PrefillLoad,
        sent: int,
        planner: Learner,
        watch: Stopwatch,
        waves: list[tuple[Wave, dict[int, int]]],
        jobs: int,
    ) -> SentExperts:
        before = self._owner.end_before(self.index)
        return SentExperts(
            load, sent, planner, watch, before, self._slots, waves, self._placement.wide, jobs,
            self._busy,
        )  # fmt: skip

    def _started(
        self, sent: SentExperts, late: npt.NDArray[np.int64], deferred: tuple[int, ...] = ()
    ) -> StreamedBatch:
        """All is decided: send the experts that go late, and set `skip`."""
        if len(late):
            try:
                sent.waves.append(self._send(late, "late"))
            except BaseException:
                sent.drop()
                raise
        skip = self.skip.numpy()
        skip[:] = np.where(self._placement.hot, HOT, np.where(self._cold, COLD, AWAY))
        for _, slot_of in sent.waves:
            skip[list(slot_of)] = HOT
        sent.note_submitted()
        self._owner.began(sent)
        return StreamedBatch(self, sent, deferred)

    def queue_ahead(self) -> None:
        """Send what the planner has chosen for the next layer."""
        send, self._send_ahead = self._send_ahead, None
        if send is not None:
            send()

    def ended(self, moment: Any) -> None:
        """The sum of the latest batch is there."""
        self._owner.ended(self.index, moment)

    def expected(self, tokens: int) -> PrefillLoad:
        """What a batch of so many tokens will find here, by the latest one."""
        counts, known = self._expected(tokens), self._known
        cold = counts[_most_first(counts, self._cold & ~known)]
        on_gpu = counts[(self._placement.hot | known) & (counts > 0)]
        return self._load(cold, on_gpu, max(0, self._slots.count // 2 - len(self._ahead_slots)))

    def send_ahead(self, count: int) -> None:
        """Send the experts with most pairs to expect, for the next batch."""
        tokens = self._owner.tokens if self._seen is None else self._seen[0]
        order = _most_first(self._expected(tokens), self._cold & ~self._known)
        chosen = order[: min(count, self._slots.free)]
        if len(chosen):
            self._ahead.append(self._send(chosen, "ahead")[0])

    def forget(self, expert: int) -> None:
        """The expert moves: a copy that is on its way may be of something else."""
        with self.turn:
            for wave in self._ahead:
                wave.slot_of.pop(expert, None)

    def give_back_ahead(self) -> None:
        """Free the slots of what came ahead."""
        self._owner.unused_bytes += len(self._ahead_slots) * self._nbytes
        _give_back(self._slots, self._ahead)

    def close(self) -> None:
        """Leave; nothing is copied out of the layer's memory any more."""
        with self.turn:
            self.give_back_ahead()
            self._send_ahead = None
            self.stager.close()
            self._owner.leave(self)
            self._owner.close_link()

    def _trace_choice(self, begin: int, load: PrefillLoad, choice: SendChoice) -> None:
        """A note of what was decided, and why."""
        name = f"layer {self.index}: {choice.late} late, {choice.ahead} ahead"
        facts: dict[str, Any] = {
            "cold experts": len(load.cold),
            "pairs of each": load.cold.tolist(),
            "experts on the GPU": load.on_gpu.experts,
            "room": load.room,
        }
        facts |= {f"{what}, predicted ms": round(1e3 * s, 3) for what, s in choice.why.items()}
        trace.note(TraceNote("decisions", name, begin, time.monotonic_ns(), facts))

    def _send(self, experts: npt.NDArray[np.int64], when: str) -> tuple[Wave, dict[int, int]]:
        ranges = {
            int(e): [torch.from_numpy(part) for part in self._layer.ranges_of(int(e))]
            for e in experts
        }
        wave = self._slots.send(self._owner.link(self._device), ranges)
        nbytes = len(ranges) * self._nbytes
        TOTALS.sent_experts += len(ranges)
        self._owner.sent_bytes += nbytes
        TOTALS.sent_bytes += nbytes
        name = f"layer {self.index}: {len(ranges)} {when}"
        self._owner.tell(wave.transfer, name, wave.flow)
        return wave, dict(wave.slot_of)

    def _expected(self, tokens: int) -> Counts:
        experts, top_k = self._shape.num_experts, self._shape.num_experts_per_tok
        if self._seen is None:
            return np.full(experts, max(1, round(tokens * top_k / experts)), np.int64)
        before, counts = self._seen
        scaled: Counts = np.rint(counts * (tokens / max(1, before))).astype(np.int64)
        return scaled

    def _anchor(self) -> None:
        """The host has just seen the routing."""
        if self._reader.read_at is not None:
            self._owner.anchored(self._reader.read_at)

    def _hot_counts(self, counts: Counts) -> Counts:
        """Those of the used experts in slots."""
        hot: Counts = counts[(counts > 0) & self._placement.hot]
        return hot

    def _busy(self) -> tuple[int, int]:
        return self._layer.busy

    @property
    def _cold(self) -> npt.NDArray[np.bool_]:
        """bool [E]: experts in the CPU's memory alone, by the order of calls."""
        cold: npt.NDArray[np.bool_] = self._placement.cold & ~self._placement.hot
        return cold

    @property
    def _known(self) -> npt.NDArray[np.bool_]:
        """bool [E]: experts that are here, or on their way, for the next batch."""
        known: npt.NDArray[np.bool_] = np.zeros(self._shape.num_experts, np.bool_)
        for wave in self._ahead:
            known[list(wave.slot_of)] = True
        return known

    @property
    def _ahead_slots(self) -> list[int]:
        return [slot for wave in self._ahead for slot in wave.slots]

    @property
    def _nbytes(self) -> int:
        return sum(self._layer.expert_nbytes(pool) for pool in range(self._layer.pool.pools))

    def _load(self, cold: Counts, on_gpu: Counts, room: int) -> PrefillLoad:
        return PrefillLoad(
            self.index,
            self._formats,
            self._nbytes,
            3 * self._shape.hidden_size * self._shape.moe_intermediate_size,
            cold,
            PairCount(len(on_gpu), int(on_gpu.sum())),
            room,
        )


class StreamedBatch:
    """A batch of a layer for which experts are sent.

    Attributes:
        skip: address of what the CPU's part goes by, uint8 [E].
        sent: those experts.
        deferred: experts that the CPU computes for the next layer's sum.
    """

    def __init__(self, layer: StreamedLayer, sent: SentExperts, deferred: tuple[int, ...]) -> None:
        self._layer, self.sent, self.deferred = layer, sent, deferred
        self.skip = layer.skip.data_ptr()

    def over(self, stream: Stream | None) -> None:
        """The layer's sum is there, in the order of `stream`."""
        self._layer.ended(self.sent.note_over(stream))

    def queue_ahead(self) -> None:
        """Send what the planner has chosen for the next layer."""
        self._layer.queue_ahead()


def _give_back(slots: TransientSlots, waves: list[Wave]) -> None:
    """Free the slots of waves that nothing has been computed with: the next copy into one comes
    behind these on the link."""
    while waves:
        slots.give_back(waves.pop(), None)


def _most_first(counts: Counts, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The chosen experts that have pairs, those with most first, then by id."""
    candidates = np.flatnonzero(chosen & (counts > 0))
    return candidates[np.argsort(-counts[candidates], kind="stable")]
