"""The hot half of a layer: what the experts in GPU memory compute of a batch.

A submission starts the CPU's part, then `HotHalf.start` computes a row for each pair of a hot
expert; the sync adds them up with the CPU's float32 sums and rounds once (`HotJob.result`). On CPU
tensors all of it is done at once, on the calling thread, while the CPU's workers are at their part;
on CUDA tensors it is queued on the stream that is entered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.table import WeightFormat
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.gpu_arguments import HotOptions
from hybrid_moe.runtime.gpu_faults import explained


class HotHalf:
    """The hot experts of one layer.

    Args:
        options: back end, number of slots, device.
        shape: of the layer. fmt: of its weights. activation: of its experts.

    Attributes:
        experts: the slots; None before `reserve`, and where there are none.
    """

    def __init__(
        self, options: HotOptions, shape: LayerShape, fmt: WeightFormat, activation: Activation
    ) -> None:
        self.options = options
        self._shape, self._fmt, self._activation = shape, fmt, activation
        self._biases: bool | None = None
        self.experts: SlotExperts | None = None

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
        layout = SlotLayout(
            self._fmt, self._shape.hidden_size, self._shape.moe_intermediate_size, tuple(shares)
        )
        slots, device = self.options.slots, self.device
        if slots:
            with explained(self._shape.layer_idx, device, slots * layout.nbytes):
                self.experts = SlotExperts(
                    layout,
                    self._activation,
                    self._shape.num_experts,
                    slots,
                    device,
                    self.options.backend,
                )
        self._biases = layout.biases

    def release(self) -> None:
        """Free the slots. Graphs that were captured find no expert in them any more."""
        experts, self.experts, self._biases = self.experts, None, None
        if experts is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check_device(self, hidden: torch.Tensor) -> None:
        """Raise `ValueError` for a batch that is not where the slots are."""
        if hidden.device != self.device:
            raise ValueError(
                f"hidden_states is on {hidden.device}, but this layer's slots are on {self.device} "
                "(gpu_device)"
            )

    def start(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HotJob:
        """Compute the hot experts' rows. The tensors may change afterwards (CUDA: in the order of
        the stream that is entered).

        Args:
            hidden: bf16 [T, H]. ids: [T, k]. weights: float [T, k].
        """
        experts = self.experts
        if experts is None:
            return HotJob(self, None, None, hidden, ids, weights)
        with explained(self._shape.layer_idx, self.device):
            ids = ids.clone(memory_format=torch.contiguous_format)
            weights = weights.to(torch.float32, copy=True).contiguous()
            rows = experts.rows(hidden.contiguous(), ids)
        return HotJob(self, experts, rows, hidden, ids, weights)


class HotJob:
    """What the hot experts have computed of a batch, until the CPU's part comes."""

    def __init__(
        self,
        half: HotHalf,
        experts: SlotExperts | None,
        rows: torch.Tensor | None,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        self._half, self._experts, self._rows = half, experts, rows
        self._ids, self._weights = ids, weights
        self._shape, self._device = hidden.shape, hidden.device
        self._slot_of = None if experts is None else experts.slot_of

    def keep_placement(self) -> None:
        """To be called before the placement changes: this job goes by the present one."""
        if self._experts is not None and self._slot_of is self._experts.slot_of:
            self._slot_of = self._slot_of.clone()

    def result(self, cold: torch.Tensor | None) -> torch.Tensor:
        """The layer's output, bf16 [T, H], a new tensor.

        Args:
            cold: float32 [T, H], the CPU's part; None where it computes nothing.
        """
        if self._experts is None or self._rows is None or self._slot_of is None:
            if cold is None:
                return torch.zeros(self._shape, dtype=torch.bfloat16, device=self._device)
            return cold.to(torch.bfloat16)
        with explained(self._half._shape.layer_idx, self._half.device):
            return self._experts.combine(self._rows, self._ids, self._weights, cold, self._slot_of)
