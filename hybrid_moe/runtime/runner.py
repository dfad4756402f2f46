"""One loaded layer at work: submissions, deferred experts, and faults that a sync reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT, IDS_FAULT, IDS_PASS
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.small import SMALL_TOKENS, SmallPass
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred
from hybrid_moe.runtime.submission import (
    Launched,
    NothingToDo,
    check_call,
    discard,
    end_quietly,
    is_plain,
    submit_direct,
)
from hybrid_moe.streams import faults
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.staging import SlotState, StagedJob, Stager

Launch = Callable[[torch.Tensor, bool], Launched]
"""Starts the experts of some ids [B, k] (others are -1) of a submission; True for those
that another layer collects."""


@dataclass(frozen=True)
class Pending:
    """A submission that waits for its sync.

    Attributes:
        shape: of the batch, (B, H).
        device: of the batch.
        job: this layer's experts; None with a `fault`.
        incoming: what the layer before has deferred.
        fault: what sync will raise.
    """

    shape: torch.Size
    device: torch.device
    job: Launched | None
    incoming: Launched | None
    fault: Exception | None


@dataclass(frozen=True)
class Placement:
    """A snapshot of the mask.

    Attributes:
        skip: bool [E], experts on the GPU.
        missing: bool [E], experts that are neither there nor loaded; None if there are none.
        epoch: changes of the mask so far.
    """

    skip: npt.NDArray[np.bool_]
    missing: npt.NDArray[np.bool_] | None
    epoch: int

    @classmethod
    def of(
        cls, mask: npt.NDArray[np.bool_], resident: npt.NDArray[np.bool_], epoch: int
    ) -> Placement:
        """The placement of a live mask, which is copied."""
        skip = mask.copy()
        missing = ~(skip | resident)
        return cls(skip, missing if missing.any() else None, epoch)


class LayerRunner:
    """Runs a loaded layer.

    Args:
        layer: the packed experts.
        shape: its sizes.
        mask: bool [E] CPU tensor, live: True for experts to skip.
        resident: bool [E]: experts that are loaded.
        chain: the model's layers; None where none of them defers.
        deferred: experts per token that may arrive one layer later; with a chain only.
        strict: ids out of range are an error.
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
    ) -> None:
        self._layer, self._shape, self._mask = layer, shape, mask
        self._resident, self._chain = resident, chain
        self._deferred, self._strict = deferred, strict
        self._mask_address = mask.data_ptr()
        self._small_calls = set[tuple[tuple[int, int], tuple[int, int]]]()
        """Shapes of hidden states and ids that `ExpertLayer.small` takes."""
        if resident.any() and not deferred:
            H, k = shape.hidden_size, shape.num_experts_per_tok
            self._small_calls = {((B, H), (B, k)) for B in range(1, SMALL_TOKENS + 1)}
        self._mask_view: npt.NDArray[np.bool_] = mask.numpy()  # shares its memory
        self._placement = Placement.of(self._mask_view, resident, 0)
        self._staged: SlotState | None = None  # of the latest run, if it was on a stream
        self._pending: Pending | None = None
        self._small: tuple[SmallPass, torch.Tensor] | None = None
        self._stager: Stager | None = None
        self._told_last = False
        self.ignored_ids = 0
        faults.attach(self)

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        return self._shape.layer_idx

    @property
    def mask_epoch(self) -> int:
        """How often the mask had changed when the latest run took its snapshot. On CUDA tensors
        that is when the stream reaches the submission: ask when the step's results have arrived."""
        return self._placement.epoch if self._staged is None else self._staged.epoch

    def submit(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: int | None,
    ) -> None:
        """See `KTMoEWrapper.submit_forward`."""
        chain = self._chain
        if self._pending is not None or self._small is not None:
            raise self._submitted_twice()
        if (
            is_plain(hidden, ids, weights)
            and (hidden.shape, ids.shape) in self._small_calls
            and weights.shape == ids.shape
            and (chain is None or chain.carried is None)
        ):
            self._submit_small(hidden, ids, weights)
            return
        check_call(hidden, ids, weights, self._shape)
        incoming = None if chain is None else chain.take(self.layer_idx, hidden.shape[0])
        job: Launched | None = None
        fault: Exception | None = None
        try:
            placement = self._placed()
            stream = self._stream(hidden.device, cuda_stream)
            if stream is None:
                fault = self._check_ids(ids, placement)
            elif placement.missing is not None:  # nobody here knows whether the ids name it
                raise self._not_loaded(int(np.flatnonzero(placement.missing)[0]))
            launch = self._launcher(hidden, weights, stream, placement.skip)
            if fault is None:
                with stream or nullcontext():
                    job = self._launch(launch, ids, weights, self._following())
            self._pending = Pending(hidden.shape, hidden.device, job, incoming, fault)
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

    def drop(self) -> None:
        """Forget the submission that was not synced, if there is one, and what it deferred."""
        small, self._small = self._small, None
        pending, self._pending = self._pending, None
        if small is not None:
            end_quietly(small[0].wait, self.layer_idx)
        if pending is not None:
            discard(pending.job, self.layer_idx)
            self._give_up(pending.incoming)

    def reset(self) -> None:
        """`drop` in all layers of the model, with what is deferred between them."""
        if self._chain is not None:
            self._chain.reset()
        self.drop()

    def _give_up(self, incoming: Launched | None) -> None:
        """Drop what came in for a submission that failed, and what it deferred."""
        discard(incoming, self.layer_idx)
        if self._chain is not None:
            self._chain.forget(self.layer_idx)

    def _submit_small(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """`submit` for tensors that need neither checks nor copies."""
        self._placed()
        self._staged = None
        out, (tokens, k) = torch.empty_like(hidden), ids.shape
        running = self._layer.small(
            tokens,
            k,
            hidden.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            self._mask_address,
            out.data_ptr(),
            out,
        )
        self._small = running, out
        self.ignored_ids += running.ignored

    def _sync_small(self, hidden: torch.Tensor, running: SmallPass, out: torch.Tensor) -> None:
        """The other half of `_submit_small`."""
        if type(hidden) is not torch.Tensor or not hidden.is_cpu or hidden.shape != out.shape:
            self._check_sync(hidden, out.shape, out.device)
        self._small = None
        running.wait()
        if running.ignored and self._strict:
            raise self._out_of_range(running.ignored)
        if running.missing >= 0:
            raise self._not_loaded(running.missing)

    def _check_sync(self, hidden: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
        """Raise unless `hidden` looks like the batch that was submitted."""
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(f"hidden_states must be a tensor, not {type(hidden).__name__}")
        if hidden.shape != shape or hidden.device != device:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden.shape)} on {hidden.device}, but "
                f"{tuple(shape)} on {device} was submitted"
            )

    def sync(self, hidden: torch.Tensor, cuda_stream: int | None) -> torch.Tensor:
        """See `KTMoEWrapper.sync_forward`."""
        if (small := self._small) is not None:
            self._sync_small(hidden, *small)
            return small[1]
        pending = self._pending
        if pending is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no submission: call submit_forward before sync_forward"
            )
        self._check_sync(hidden, pending.shape, pending.device)
        self._pending = None
        try:
            stream = self._stream(pending.device, cuda_stream)
            if (fault := pending.fault) is not None:
                # a new one: its traceback would lead back to one that is kept here, and keep us
                raise type(fault)(*fault.args)
            assert pending.job is not None
            output = pending.job.result(stream)
        except BaseException:
            self._give_up(pending.incoming)
            raise
        if pending.incoming is not None:
            try:
                earlier = pending.incoming.result(stream)
            except BaseException:
                self._give_up(None)
                raise
            if stream is None:
                return output.add_(earlier)
            stream.add(output, earlier)
        if stream is not None:
            self._raise_reported(stream)
        return output

    def close(self) -> None:
        """End what is under way."""
        self.drop()
        self._stager = self._staged = None

    def _following(self) -> int | None:
        """The layer that deferred experts go to; None if this one defers nothing."""
        if not self._deferred or self._chain is None:
            return None
        following = self._chain.after(self.layer_idx)
        if following is None and not self._told_last:
            self._told_last = True
            self._chain.tell_last(self.layer_idx)
        return following

    def _launcher(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        stream: Stream | None,
        skip: npt.NDArray[np.bool_],
    ) -> Launch:
        """How experts start on this batch."""
        if not self._resident.any():
            return lambda ids, later: NothingToDo(hidden)
        if stream is not None:
            return self._cuda_launcher(hidden, weights, stream)
        self._staged = None
        return lambda ids, later: submit_direct(self._layer, hidden, ids, weights, skip)

    def _launch(
        self, launch: Launch, ids: torch.Tensor, weights: torch.Tensor, following: int | None
    ) -> Launched:
        """Start the experts of `ids`, the deferrable ones as a job of their own."""
        if following is None or self._chain is None:
            return launch(ids, False)
        protected = self._shape.num_experts_per_tok - self._deferred
        now, later = split_deferred(ids, weights, protected, self._shape.num_experts)
        job = launch(now, False)
        try:
            self._chain.carry(self.layer_idx, following, launch(later, True))
        except BaseException:
            job.discard()
            raise
        return job

    def _placed(self) -> Placement:
        """The mask as it is now. It seldom changes, so the last snapshot is kept."""
        now = self._mask_view.tobytes()
        if now != self._placement.skip.tobytes():
            epoch = self._placement.epoch + 1
            self._placement = Placement.of(np.frombuffer(now, np.bool_), self._resident, epoch)
        return self._placement

    def _check_ids(self, ids: torch.Tensor, placement: Placement) -> Exception | None:
        """Count ids [B, k] on the CPU that are nobody's; what is wrong with them, if anything."""
        E, values = self._shape.num_experts, ids.numpy()
        unsigned = values.view(np.uint64 if values.dtype == np.int64 else np.uint32)
        ignored = int(np.count_nonzero(unsigned >= E))  # negative ids are huge as unsigned ones
        self.ignored_ids += ignored
        if ignored and self._strict:
            return self._out_of_range(ignored)
        if placement.missing is not None:
            lost = np.flatnonzero(placement.missing & np.isin(np.arange(E), values))
            if lost.size:
                return self._not_loaded(int(lost[0]))
        return None

    def _out_of_range(self, count: int) -> IndexError:
        return IndexError(
            f"layer {self._shape.layer_idx}: {count} of the ids in topk_ids are outside "
            f"0..{self._shape.num_experts - 1} (strict=True)"
        )

    def _not_loaded(self, expert: int) -> RuntimeError:
        return RuntimeError(
            f"layer {self._shape.layer_idx}: tokens are routed to expert {expert}, which "
            "gpu_experts_mask no longer puts on the GPU and which was not loaded: the mask was "
            "True for it when the weights were loaded"
        )

    # CUDA ---------------------------------------------------------------------------------------

    def _stream(self, device: torch.device, handle: int | None) -> Stream | None:
        """The caller's stream on a GPU, None on the CPU."""
        if device.type == "cpu":
            return None
        from hybrid_moe.streams.cuda import cuda_stream

        return cuda_stream(device, handle or 0)

    def _cuda_launcher(self, hidden: torch.Tensor, weights: torch.Tensor, stream: Stream) -> Launch:
        """How experts start on CUDA tensors. Nobody waits here: ids out of range are found by the
        workers and raised at a later call."""
        if self._strict and self._deferred:
            raise ValueError(
                "strict=True cannot tell ids out of range from deferred ones on CUDA tensors: "
                "set max_deferred_experts_per_token=0"
            )
        stager = self._stager
        if stager is None:
            stager = self._stager = Stager(self._layer, self._mask)
        self._raise_reported(stream)
        ignored = IDS_PASS if self._deferred else IDS_FAULT if self._strict else IDS_COUNT

        def launch(ids: torch.Tensor, later: bool) -> StagedJob:
            job = stager.submit(stream, hidden, ids, weights, ignored_ids=ignored, join=later)
            self._staged = job.slot.state
            return job

        return launch

    def _raise_reported(self, stream: Stream) -> None:
        """Raise what workers have reported about runs that the host did not wait for. Not during a
        capture, which has nothing to do with them."""
        if not stream.capturing() and (error := self.take_error()) is not None:
            raise error

    def take_error(self) -> Exception | None:
        """What workers have met in runs that have ended since the last call; never waits."""
        if self._stager is None:
            return None
        report = self._stager.report()
        self.ignored_ids += report.ignored
        if report.error is not None:
            return RuntimeError(f"layer {self._shape.layer_idx}: {report.error}")
        if report.missing:
            return self._not_loaded(report.missing_expert)
        if report.ignored and self._strict:
            return self._out_of_range(report.ignored)
        return None
