"""Experts of one layer split between a GPU's slots (hot) and the CPU's strips (cold)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.filling import Fill
from hybrid_moe.wrapper import KTMoEWrapper


@dataclass(frozen=True)
class LayerSplit:
    """How one layer is split.

    Attributes:
        layer: its index in the model.
        top_k: experts that a token takes.
        mask: bool [E], True for hot experts.
        backend: what computes these, "cute" or "torch".
        device: where their slots are.
    """

    layer: int
    top_k: int
    mask: torch.Tensor
    backend: str
    device: torch.device


class SplitExperts:
    """The experts of one layer, in slots and in strips. Any thread may call it, one at a time
    computes.

    Attributes:
        wrapper: holds both halves.
    """

    def __init__(self, spec: ExpertsSpec, options: ExpertsOptions, split: LayerSplit) -> None:
        """Describe them.

        Raises:
            ValueError: CuTe kernels for a layer that is not on a GPU.
        """
        if split.backend == "cute" and split.device.type != "cuda":
            raise ValueError(
                f'{spec.where} is on {split.device}, and gpu_backend="cute" computes on GPUs: give '
                'gpu_backend="torch", or a device_map that puts the layer on one'
            )
        self._device, self._where, self._lock = split.device, spec.where, ProcessLock()
        self.wrapper = KTMoEWrapper(
            layer_idx=split.layer,
            num_experts=spec.num_experts,
            num_experts_per_tok=split.top_k,
            hidden_size=spec.hidden,
            moe_intermediate_size=spec.intermediate,
            gpu_experts_mask=split.mask,
            cpuinfer_threads=options.threads,
            threadpool_count=options.pools,
            method=options.method,
            swiglu_limit=spec.activation.limit,
            swiglu_alpha=spec.activation.alpha,
            gpu_backend=split.backend,
            gpu_device=split.device,
        )

    @property
    def layer(self) -> ExpertLayer:
        """The cold half."""
        return self.wrapper.cold_layer

    def load(self, fill: Fill) -> None:
        """Load all experts, each into the half that it belongs to."""
        self.wrapper.load_from(fill)

    def unpack(self, expert: int) -> ExpertTensors:
        """A copy of an expert, hot or cold, bit for bit as it was loaded."""
        with self._lock:
            return self.wrapper.unpack(expert)

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' sum for hidden [..., H], ids and weights [S, k], in hidden's dtype.

        On a GPU in the order of the current stream. Tensors of another device than the slots' are
        copied there and back.

        Raises:
            ValueError: k is not what the configuration says.
        """
        wrapper = self.wrapper
        if ids.shape[1] != wrapper.num_experts_per_tok:
            raise ValueError(
                f"{self._where}: {ids.shape[1]} experts per token, but the model was loaded for "
                f"{wrapper.num_experts_per_tok} by its configuration"
            )
        x = hidden.detach().to(self._device, torch.bfloat16).reshape(-1, hidden.shape[-1])
        ids = ids.detach().to(self._device, torch.int64)
        weights = weights.detach().to(self._device, torch.float32)
        stream = None
        if x.is_cuda:
            stream = torch.cuda.current_stream(x.device).cuda_stream
        with self._lock:
            y = wrapper.forward(x, ids, weights, stream)
        return y.to(hidden.device, hidden.dtype).reshape(hidden.shape)

    @property
    def pairs(self) -> tuple[int, int]:
        """Pairs of token and expert so far: on the GPU, and on the CPU."""
        return self.wrapper.pairs
