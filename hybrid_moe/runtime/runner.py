"""One loaded layer at work: submissions, deferred experts, and faults that a sync reports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT, IDS_FAULT, IDS_PASS
from hybrid_moe.cpu_kernels.job import Job
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.streams.progress import Progress
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.call import check_call, is_plain, plain
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.host_mask import HostMask
from hybrid_moe.runtime.hot_half import HotHalf, HotJob, entered
from hybrid_moe.runtime.layer_deferral import LayerDeferral, Parts
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.runtime.streamed_layer import StreamedBatch, StreamedLayer
from hybrid_moe.runtime.submission import Started, Submission, discard
from hybrid_moe.streams.faults import LayerFaults
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.staging import Stager, StreamJob, StreamZeros


class LayerRunner:
    """Runs a loaded layer.

    Args:
        layer: the packed experts.
        shape: its sizes.
        mask: bool or uint8 [E] CPU tensor, live: not 0 for experts to skip.
        resident: bool [E]: experts that are loaded.
        chain: the model's layers; None where none of them defers.
        deferred: experts per token that may arrive one layer later; with a chain only.
        strict: ids out of range are an error.
        halves: the hot half, and what says which experts are its own; None where the caller
            computes the experts that the mask skips. With it, jobs leave their sums unrounded.
        prefill_stream: sends experts to the GPU for a batch; with `halves` only.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        shape: LayerShape,
        mask: torch.Tensor,
        resident: npt.NDArray[np.bool_],
        chain: DeferralChain | None,
        *,
        deferred: int,
        strict: bool,
        halves: tuple[HotHalf, ExpertPlacement] | None = None,
        prefill_stream: PrefillStream | None = None,
    ) -> None:
        self._layer, self._shape, self._strict = layer, shape, strict
        self._deferral = LayerDeferral(shape, chain, deferred)
        self._has_experts = bool(resident.any())
        # with both halves no expert is ever nowhere: it comes to the CPU before its mask is 0
        self._mask = HostMask(mask, resident if halves is None else np.ones_like(resident))
        self._seen_mask: HostMask | Progress = self._mask  # by the latest run
        self._halves = halves
        self._out_type = torch.bfloat16 if halves is None else torch.float32
        self._stager = Stager(layer, mask, out_type=self._out_type)
        self._streamed: StreamedLayer | None = None
        if prefill_stream is not None and halves is not None and self._has_experts:
            self._streamed = StreamedLayer(prefill_stream, layer, *halves, shape)
        self._hot_pairs = 0  # of runs in which the CPU had no part
        self._faults = LayerFaults(layer, shape.layer_idx, strict=strict)
        self._submission: Submission | None = None
        self._latest_stream: Stream | None = None
        """Of a call with both halves, not of a capture; or of the moves before the first call."""

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        return self._shape.layer_idx

    @property
    def mask_epoch(self) -> int:
        """How often the mask had changed when the latest run took its snapshot. On CUDA tensors
        that is when the stream reaches the submission: ask when the step's results have arrived."""
        return self._seen_mask.epoch

    @property
    def ignored_ids(self) -> int:
        """Ids out of range in all calls so far."""
        return self._faults.ignored_ids

    def submit(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: int | None,
        *,
        unchanged: bool = False,
    ) -> None:
        """See `KTMoEWrapper.submit_forward`. `unchanged`: nobody changes the tensors before `sync`
        is called."""
        if self._submission is not None:
            raise self._submitted_twice()
        as_it_is = is_plain(hidden, ids, weights, self._shape)
        if not as_it_is:
            check_call(hidden, ids, weights, self._shape)
        halves = self._halves
        if halves is not None:
            halves[0].check_device(hidden)
            halves[1].check_mask()
        incoming = self._deferral.take(hidden.shape[0])
        job: Started | None = None
        hot: HotJob | None = None
        fault: Exception | None = None
        batch: StreamedBatch | None = None
        try:
            stream = self._stream(hidden, cuda_stream)
            if stream is None and not as_it_is:
                hidden, ids, weights = plain(hidden, ids, weights)

            streamed = self._streamed
            if streamed is not None and streamed.wants(hidden.shape[0], stream):
                if stream is not None:
                    self._follow_latest(stream)
                with streamed.turn:
                    most = self._deferral.most
                    batch = streamed.begin(stream, ids, weights, most, self._settle)
                    try:
                        job, hot, fault = self._start_streamed(batch, stream, hidden, ids, weights)
                    except BaseException:
                        batch.sent.drop()
                        raise
            elif stream is None:
                job, fault = self._start_all(hidden, ids, weights)
                if halves is not None:
                    hot = halves[0].start(None, hidden, ids, weights, unchanged=unchanged)
            elif halves is None:
                job = self._start_on(stream, hidden, ids, weights)
            else:
                if not stream.capturing():
                    self._follow_latest(stream)
                started: list[HotJob] = []
                start = partial(halves[0].start, stream, hidden, ids, weights, unchanged=unchanged)
                job = self._start_on(stream, hidden, ids, weights, lambda: started.append(start()))
                hot = started[0]
            self._submission = Submission(
                hidden.shape, hidden.device, job, incoming, fault, hot, batch
            )
        except BaseException:
            discard(job, self.layer_idx)
            self._give_up(incoming)
            raise

    def _submitted_twice(self) -> RuntimeError:
        """Drop the submission that nobody has synced, and say so."""
        self.reset()
        return RuntimeError(
            f"layer {self.layer_idx} has a submission already: call sync_forward before the next "
            "submit_forward, or reset() after a step that failed between the two. That submission "
            "is dropped now; the next one starts clean"
        )

    def sync(self, hidden: torch.Tensor, cuda_stream: int | None) -> torch.Tensor:
        """See `KTMoEWrapper.sync_forward`."""
        submission = self._submission
        if submission is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no submission: call submit_forward before sync_forward"
            )
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(f"hidden_states must be a tensor, not {type(hidden).__name__}")
        if hidden.shape != submission.shape or hidden.device != submission.device:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden.shape)} on {hidden.device}, but "
                f"{tuple(submission.shape)} on {submission.device} was submitted"
            )
        self._submission = None
        try:
            on_host = isinstance(submission.job, Job)
            stream = None if on_host else self._stream(hidden, cuda_stream)
            output = submission.result(stream)
        except BaseException:
            self._give_up(submission.incoming)
            raise
        if stream is not None:
            self._raise_reported(stream)
        return output

    def drop(self) -> None:
        """Drop the submission that was not synced, if there is one, and what it deferred."""
        submission, self._submission = self._submission, None
        if submission is not None:
            discard(submission.job, self.layer_idx)
            self._give_up(submission.incoming)

    @property
    def pairs(self) -> tuple[int, int]:
        """(Token, expert) pairs so far: on the GPU, and on the CPU."""
        hot, cold = self._layer.pairs
        return hot + self._hot_pairs, cold

    def _count_hot(self, pairs: int) -> None:
        """Count pairs of a run in which the CPU has no part."""
        self._hot_pairs += pairs
        TOTALS.hot_pairs += pairs

    def move(self, expert: int, hot: bool, cuda_stream: int | None) -> None:
        """Promote an expert to the hot half or demote it, in the order of calls."""
        if self._halves is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no gpu_backend: experts cannot be moved"
            )
        half, placement = self._halves
        experts = half.experts
        stream = None if experts is None else self._stream(experts.memory, cuda_stream)
        move = placement.promote if hot else placement.demote
        if self._streamed is not None:
            self._streamed.forget(expert)
        if stream is not None and self._latest_stream is None:
            self._latest_stream = stream  # the next call, or move, on another one waits for it
        latest = self._latest_stream
        if stream is None or latest is None or latest.handle == stream.handle:
            move(expert, stream, self._settle)
            return
        placement.check_stream(stream)
        placement.check_stream(latest)
        stream.wait(latest.record())
        try:
            move(expert, stream, self._settle)
        finally:
            latest.wait(stream.record())

    def _follow_latest(self, stream: Stream) -> None:
        """Let `stream` wait for the layer's latest call, and all moves, if that was on another."""
        latest = self._latest_stream
        if latest is not None and latest.handle != stream.handle:
            stream.wait(latest.record())
        self._latest_stream = stream

    def wait_for_moves(self) -> None:
        """Return when every expert is where `move` has put it."""
        if self._halves is not None:
            self._halves[1].wait()

    def _settle(self, stream: Stream | None) -> None:
        """Let what follows wait for the layer's jobs under way, which may read any expert here. The
        hot half of a submission has read what it needs, but for which experts were its own."""
        if stream is None:
            self._layer.wait_all()
        else:
            self._stager.settle(stream)
            if self._streamed is not None:
                self._streamed.stager.settle(stream)
        if self._submission is not None and self._submission.hot is not None:
            self._submission.hot.keep_placement(stream)

    def reset(self) -> None:
        """`drop` in all layers of the model, with what is deferred between them."""
        self._deferral.reset()
        self.drop()

    def unpack(self, expert: int) -> ExpertTensors:
        """See `KTMoEWrapper.unpack`."""
        return (self._layer if self._halves is None else self._halves[1]).unpack(expert)

    def close(self) -> None:
        """End what is under way."""
        self.drop()
        self._seen_mask = self._mask
        self._stager.close()
        if self._streamed is not None:
            self._streamed.close()

    def take_error(self) -> Exception | None:
        """What workers have met in runs that have ended since the last call; never waits."""
        return self._faults.take()

    def _give_up(self, incoming: Started | None) -> None:
        """Drop what came in for a submission that failed, and what it deferred."""
        discard(incoming, self.layer_idx)
        self._deferral.drop()

    def _start_streamed(
        self,
        batch: StreamedBatch,
        stream: Stream | None,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[Started, HotJob, Exception | None]:
        """Start a batch in three parts: the CPU's experts, those in slots, and those that are sent.
        What is wrong with the ids of plain tensors comes back, for the sync."""
        assert self._halves is not None and self._streamed is not None
        half, sent, fault = self._halves[0], batch.sent, None
        with entered(stream):
            parts = self._deferral.split_off(ids, batch.deferred)
        job: Started
        if stream is None:
            self._mask.look()
            ignored = self._deferral.out_of_range(ids) if batch.deferred else 0
            job, fault = self._start_parts(hidden, parts, weights, ignored, batch.skip)
            batch.queue_ahead()  # the host computes the rest now
            begin = sent.watch.now()
            hot = half.start(None, hidden, ids, weights)
        else:
            self._raise_reported(stream)
            ignored = self._ignored(later=bool(batch.deferred))
            begin, started = sent.watch.now(), list[HotJob]()

            def start_hot() -> None:
                started.append(half.start(stream, hidden, ids, weights))

            with stream:
                stager = self._streamed.stager
                job = self._queue(stager, stream, hidden, parts, weights, ignored, start_hot)
            hot = started[0]
        try:
            sent.note_gpu(begin)
            hot.sent = sent.compute(stream, hidden, ids, weights)
            if stream is not None:
                batch.queue_ahead()  # copies that the driver must help with wait for the host
        except BaseException:
            discard(job, self.layer_idx)
            raise
        return job, hot, fault

    # CPU tensors --------------------------------------------------------------------------------

    def _start_all(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Job[torch.Tensor], Exception | None]:
        """Start the experts of plain tensors, the deferrable ones as a job of their own. What is
        wrong with the ids comes back, for the sync."""
        self._mask.look()
        self._seen_mask = self._mask
        parts, ignored = self._deferral.split_plain(ids, weights)
        return self._start_parts(hidden, parts, weights, ignored)

    def _start_parts(
        self,
        hidden: torch.Tensor,
        parts: Parts,
        weights: torch.Tensor,
        ignored: int,
        skip: int | None = None,
    ) -> tuple[Job[torch.Tensor], Exception | None]:
        """Start the ids of plain tensors, those that run later as a job of their own; see `_start`.
        `ignored`: ids of both that are out of range, which neither has. What is wrong with them
        comes back, for the sync."""
        now, later = parts
        job = self._start(hidden, now, weights, skip)
        if later is None:
            if job.ignored or job.missing >= 0:
                return job, self._faults.count(job.ignored, job.missing)
            return job, None
        try:
            fault = self._faults.count(ignored, job.missing)
            if fault is None:
                deferred = self._start(hidden, later, weights, skip)
                fault = self._faults.count(0, deferred.missing)
                if fault is None:
                    self._deferral.carry(deferred)
        except BaseException:
            discard(job, self.layer_idx)
            raise
        return job, fault

    def _start(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        skip: int | None = None,
    ) -> Job[torch.Tensor]:
        """Start the experts of plain tensors that the mask at `skip` leaves, or the live one."""
        tokens, out_type = ids.size(0), self._out_type
        if not self._has_experts:
            known = ids[(ids >= 0) & (ids < self._shape.num_experts)]
            self._count_hot(self._mask.hot(known))
            zeros = torch.zeros_like(hidden, dtype=out_type)
            missing = self._mask.missing(known)
            return Job(None, zeros, tokens, ids.numel() - known.numel(), missing)
        out = torch.empty_like(hidden, dtype=out_type)
        return self._layer.start(
            Batch(
                tokens,
                self._shape.num_experts_per_tok,
                hidden.data_ptr(),
                ids.data_ptr(),
                weights.data_ptr(),
                self._mask.address if skip is None else skip,
                out.data_ptr(),
                out.element_size(),
            ),
            out,
        )

    # CUDA tensors -------------------------------------------------------------------------------

    def _stream(self, hidden: torch.Tensor, handle: int | None) -> Stream | None:
        """The caller's stream on a GPU, None on the CPU."""
        if hidden.is_cpu:
            return None
        from hybrid_moe.streams.cuda import cuda_stream

        return cuda_stream(hidden.device, handle or 0)

    def _start_on(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        start_hot: Callable[[], None] | None = None,
    ) -> StreamJob | StreamZeros:
        """Queue the experts of a batch, the deferrable ones as a job of their own, and the hot half
        while the inputs are on their way. Nobody waits here: ids out of range are found by the
        workers and raised at a later call."""
        self._mask.look()
        if self._mask.nowhere >= 0:  # nobody here knows whether the ids name it
            raise self._faults.not_loaded(self._mask.nowhere)
        ignored = self._ignored(later=self._deferral.count > 0 and self._has_experts)
        self._raise_reported(stream)
        with stream:
            if self._has_experts:
                parts = self._deferral.split(ids, weights)
                return self._queue(self._stager, stream, hidden, parts, weights, ignored, start_hot)
            if start_hot is not None:
                start_hot()
            self._count_hot(ids.numel())  # nobody here knows which are out of range
            return StreamZeros(hidden, self._out_type)

    def _queue(
        self,
        stager: Stager,
        stream: Stream,
        hidden: torch.Tensor,
        parts: Parts,
        weights: torch.Tensor,
        ignored: int,
        beside: Callable[[], None] | None,
    ) -> StreamJob:
        """Queue the ids, those that run later as a job of their own; the rest as for
        `Stager.submit`."""
        now, later = parts
        job = stager.submit(stream, hidden, now, weights, ignored_ids=ignored, beside=beside)
        self._seen_mask = job.graph_job.progress
        if later is None:
            return job
        try:
            deferred = stager.submit(stream, hidden, later, weights, ignored_ids=ignored, join=True)
            self._seen_mask = deferred.graph_job.progress
            self._deferral.carry(deferred)
        except BaseException:
            job.discard()
            raise
        return job

    def _ignored(self, *, later: bool) -> int:
        """What ids out of range mean to a job on CUDA tensors; `later`: it may be one of two."""
        if not later:
            return IDS_FAULT if self._strict else IDS_COUNT
        if self._strict:
            raise ValueError(
                "strict=True cannot tell ids out of range from deferred ones on CUDA tensors: "
                "set max_deferred_experts_per_token=0"
            )
        return IDS_PASS

    def _raise_reported(self, stream: Stream) -> None:
        """Raise what workers have reported about runs that the host did not wait for. Not during a
        capture, which has nothing to do with them."""
        if not stream.capturing() and (error := self.take_error()) is not None:
            raise error
