"""The hot half of a layer: what the experts in GPU memory compute of a batch.

A submission starts the CPU's part, then `HotHalf.start` computes a row for each pair of a hot
expert; the sync adds them up with the CPU's float32 sums and rounds once (`HotJob.result`). On CPU
tensors all of it is done at once, on the calling thread, while the CPU's workers are at their part;
on CUDA tensors it is queued on the caller's stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.gpu_kernels.slot_experts import AT_ONCE, SlotExperts, check_experts
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.gpu_arguments import HotOptions
from hybrid_moe.runtime.gpu_faults import explained
from hybrid_moe.streams.interface import Stream

_CONTIGUOUS = torch.contiguous_format


class HotHalf:
    """The hot experts of one layer.

    Args:
        options: back end, number of slots, device.
        shape: of the layer. formats: of its weights. activation: of its experts.

    Attributes:
        layout: of a slot; None before `reserve`.
        experts: the slots; None before `reserve`, and where there are none.

    Raises:
        NotImplementedError: the back end cannot read the format. ValueError: nor such sizes.
    """

    def __init__(
        self,
        options: HotOptions,
        shape: LayerShape,
        formats: LayerFormats,
        activation: Activation,
    ) -> None:
        check_experts(options.backend, formats, shape.hidden_size, shape.moe_intermediate_size)
        self.options = options
        self._shape, self._formats, self._activation = shape, formats, activation
        self._biases: bool | None = None
        self.layout: SlotLayout | None = None
        self.experts: SlotExperts | None = None
        self._captured: weakref.finalize[Any, SlotExperts] | None = None

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self.options.device

    @property
    def biases(self) -> bool | None:
        """Whether slots have room for biases; None before `reserve`."""
        return self._biases

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return 0 if self.experts is None else self.experts.nbytes

    def reserve(self, shares: Sequence[ShareLayout]) -> None:
        """Allocate the slots, unless that is done.

        Args:
            shares: of each pool, its range of an expert.

        Raises:
            RuntimeError: the device has no room.
        """
        if self._biases is not None:
            return
        self.layout = SlotLayout(
            self._formats,
            self._shape.hidden_size,
            self._shape.moe_intermediate_size,
            tuple(shares),
        )
        if self.options.slots:
            self.experts = self.new_slots(self.options.slots)
        self._biases = self.layout.biases

    def new_slots(self, slots: int) -> SlotExperts:
        """Slots of this layer's layout, in which no expert is.

        Raises:
            RuntimeError: the device has no room.
        """
        layout, device = self.layout, self.device
        assert layout is not None
        with (
            torch.inference_mode(False),  # else only inference mode could move experts later
            explained(self._shape.layer_idx, device, slots * layout.nbytes),
        ):
            return SlotExperts(
                layout,
                self._activation,
                self._shape.num_experts,
                slots,
                device,
                self.options.backend,
                self.options.fp8_prefill,
            )

    @property
    def kind(self) -> Hashable:
        """Equal for layers whose experts can take turns in the same slots."""
        options = self.options
        return (
            self.layout,
            self._activation,
            self._shape.num_experts,
            options.device,
            options.backend,
            options.fp8_prefill,
        )

    def release(self) -> None:
        """Free the slots, when the device is through with them. A graph that was captured finds
        that no expert has one any more; what it reads to find that, some KB, stays for good, since
        the end of a graph is not reported."""
        experts, self.experts, self._biases = self.experts, None, None
        if experts is not None and self.device.type == "cuda":
            with explained(self.layer_idx, self.device):
                experts.slot_of.fill_(-1)
                torch.cuda.synchronize(self.device)
            keeping.for_good(experts.small_tensors)
            if self._captured is not None:
                self._captured.detach()
            keeping.release(most=None)  # moves that were under way

    def check_device(self, hidden: torch.Tensor) -> None:
        """Raise `ValueError` for a batch that is not where the slots are."""
        if hidden.device != self.device:
            raise ValueError(
                f"hidden_states is on {hidden.device}, but this layer's slots are on {self.device} "
                "(gpu_device)"
            )

    @property
    def experts_per_token(self) -> int:
        """k."""
        return self._shape.num_experts_per_tok

    @property
    def num_experts(self) -> int:
        """E."""
        return self._shape.num_experts

    @property
    def layer_idx(self) -> int:
        """Of the layer, for messages."""
        return self._shape.layer_idx

    def start(
        self,
        stream: Stream | None,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        unchanged: bool = False,
    ) -> HotJob:
        """Compute the hot experts' rows. The tensors may change afterwards.

        Args:
            stream: in whose order; None on CPU tensors: now.
            hidden: bf16 [T, H]. ids: [T, k]. weights: float [T, k].
            unchanged: ids and weights stay as they are until the result is there, which saves two
                copies.
        """
        experts = self.experts
        if experts is None:
            return HotJob(self, stream, hidden, None)
        if self._captured is None and stream is not None and stream.capturing():
            # dropped without `release`, the slots must stay: the graph may be replayed all the same
            tensors = (experts.memory, *experts.small_tensors)
            self._captured = weakref.finalize(experts, keeping.for_good, tensors)
            self._captured.atexit = False
        with entered(stream), explained(self.layer_idx, self.device):
            ids = ids.contiguous() if unchanged else ids.clone(memory_format=_CONTIGUOUS)
            weights = weights.resolve_neg().to(torch.float32, copy=not unchanged).contiguous()
            x = hidden.resolve_neg().contiguous()
            added = len(ids) > AT_ONCE
            rows = experts.sums(x, ids, weights) if added else experts.rows(x, ids)
        hot = HotRows(experts, rows, added, ids, weights, experts.slot_of)
        return HotJob(self, stream, hidden, hot)


def entered(stream: Stream | None) -> AbstractContextManager[None]:
    """What torch queues meanwhile goes to `stream`; None: to the host."""
    return nullcontext() if stream is None else stream


@dataclass
class HotRows:
    """A row for each pair of a hot expert, and what `SlotExperts.combine` needs beside it; or a row
    for each token, with its pairs `added` up (`SlotExperts.sums`)."""

    experts: SlotExperts
    rows: torch.Tensor
    added: bool
    ids: torch.Tensor
    weights: torch.Tensor
    slot_of: torch.Tensor


class HotJob:
    """What the hot experts have computed of a batch, until the CPU's part comes."""

    def __init__(
        self, half: HotHalf, stream: Stream | None, hidden: torch.Tensor, rows: HotRows | None
    ) -> None:
        self._half, self._stream, self._rows = half, stream, rows
        self._shape, self._device = hidden.shape, hidden.device
        self.sent: torch.Tensor | None = None
        """float32 [T, H]: what experts give that were sent for this batch alone."""

    def keep_placement(self, stream: Stream | None) -> None:
        """To be called before the placement changes in the order of `stream`: this job goes by the
        present one."""
        rows = self._rows
        if rows is not None and rows.slot_of is rows.experts.slot_of:
            with entered(stream):
                rows.slot_of = rows.slot_of.clone()

    def result(self, cold: torch.Tensor | None, stream: Stream | None) -> torch.Tensor:
        """The layer's output, bf16 [T, H], a new tensor.

        Args:
            cold: float32 [T, H], the CPU's part; None where it computes nothing.
            stream: in whose order.
        """
        rows = self._rows
        with entered(stream):
            if cold is not None:  # what a layer without a back end has deferred is rounded already
                cold = cold.float()
            if self.sent is not None:
                if stream is not None and self._stream is not None:
                    self._follow(stream, self._stream, [self.sent])
                cold = self.sent if cold is None else cold + self.sent
            if rows is None:
                if cold is not None:
                    return cold.to(torch.bfloat16)
                return torch.zeros(self._shape, dtype=torch.bfloat16, device=self._device)
            if stream is not None and self._stream is not None:
                parts = [rows.rows, rows.ids, rows.weights, rows.slot_of]
                self._follow(stream, self._stream, parts)
            with explained(self._half.layer_idx, self._half.device):
                if rows.added:
                    total = rows.rows if cold is None else rows.rows + cold
                    return total.to(torch.bfloat16)
                return rows.experts.combine(rows.rows, rows.ids, rows.weights, cold, rows.slot_of)

    @staticmethod
    def _follow(stream: Stream, computed_on: Stream, tensors: Sequence[torch.Tensor]) -> None:
        """Let `stream` use what another stream has computed."""
        if stream.handle == computed_on.handle:
            return
        stream.wait(computed_on.record())
        for tensor in tensors:
            if tensor.is_cuda:  # its memory must not be used again before `stream` is done
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
