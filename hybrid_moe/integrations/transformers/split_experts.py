"""Experts of one layer split between a GPU's slots (hot) and the CPU's strips (cold)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.filling import Fill
from hybrid_moe.runtime.prefill_stream import PrefillStream


@dataclass(frozen=True)
class SplitSpec:
    """How one layer is split.

    Attributes:
        layer: its index in the model.
        top_k: experts that a token takes.
        mask: bool [E], True for hot experts.
        backend: what computes these, "cute" or "torch".
        device: where their slots are.
        activation: "fp8" for W8A8 prefill, see `KTMoEWrapper`; else None.
        panels: "keep" keeps hot experts on the CPU too, see `KTMoEWrapper`.
        prefill_stream: likewise; None where the CPU computes all cold experts.
        deferral_chain: of the model's layers on this device; None where they defer nothing.
        deferred: experts of a token that are added one layer later.
    """

    layer: int
    top_k: int
    mask: torch.Tensor
    backend: str
    device: torch.device
    activation: str | None = None
    panels: str | None = None
    prefill_stream: PrefillStream | None = None
    deferral_chain: DeferralChain | None = None
    deferred: int = 0


class SplitExperts:
    """The experts of one layer, in slots and in strips. Any thread may call it, one at a time
    computes.

    Attributes:
        wrapper: holds both halves.
        backend: what computes the hot ones.
        device: where these are.
        before_step: called before each batch, on the device's current stream; of a model's first
            layer, where its experts move.
    """

    before_step: Callable[[], object] | None = None

    def __init__(
        self, spec: ExpertsSpec, options: ExpertsOptions, formats: LayerFormats, split: SplitSpec
    ) -> None:
        """Describe them.

        Raises:
            ValueError: CuTe kernels for a layer that is not on a GPU.
        """
        if split.backend == "cute" and split.device.type != "cuda":
            raise ValueError(
                f'{spec.where} is on {split.device}, and gpu_backend="cute" computes on GPUs: give '
                'gpu_backend="torch", or a device_map that puts the layer on one'
            )
        from hybrid_moe.wrapper import KTMoEWrapper  # 0.1 s, of those alone who split

        self.backend, self.device = split.backend, split.device
        self._where, self._lock = spec.where, ProcessLock()
        self.wrapper = KTMoEWrapper(
            layer_idx=split.layer,
            num_experts=spec.num_experts,
            num_experts_per_tok=split.top_k,
            hidden_size=spec.hidden,
            moe_intermediate_size=spec.intermediate,
            gpu_experts_mask=split.mask,
            cpuinfer_threads=options.threads,
            threadpool_count=options.pools,
            formats=formats,
            swiglu_limit=spec.activation.limit,
            swiglu_alpha=spec.activation.alpha,
            gpu_backend=split.backend,
            gpu_device=split.device,
            gpu_activation=split.activation,
            gpu_panels=split.panels,
            cpu_activation=options.cpu_activation,
            prefill_stream=split.prefill_stream,
            deferral_chain=split.deferral_chain,
            max_deferred_experts_per_token=split.deferred,
        )

    def load(self, fill: Fill) -> None:
        """Load all experts, each into the half that it belongs to."""
        self.wrapper.load_weights_by(fill)

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
            ValueError: k is more than the configuration says.
        """
        wrapper = self.wrapper
        missing = wrapper.num_experts_per_tok - ids.shape[1]
        if missing < 0:
            raise ValueError(
                f"{self._where}: {ids.shape[1]} experts per token, but the model's configuration "
                f"says {wrapper.num_experts_per_tok}"
            )
        x = hidden.detach().to(self.device, torch.bfloat16).reshape(-1, hidden.shape[-1])
        ids = ids.detach().to(self.device, torch.int64)
        weights = weights.detach().to(self.device, torch.float32)
        if missing:  # -1 is no expert
            ids, weights = pad(ids, (0, missing), value=-1), pad(weights, (0, missing))
        if self.before_step is not None:
            self.before_step()
        with self._lock:
            y = wrapper.forward(x, ids, weights, self.stream)
        return y.to(hidden.device, hidden.dtype).reshape(hidden.shape)

    @property
    def lock(self) -> ProcessLock:
        """Whoever calls the wrapper has it."""
        return self._lock

    @property
    def stream(self) -> int | None:
        """The device's current stream, as the wrapper takes it."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).cuda_stream

    @property
    def pairs(self) -> tuple[int, int]:
        """Pairs of token and expert so far: on the GPU, and on the CPU."""
        return self.wrapper.pairs
