"""The module that stands where a model's experts were, and the bridge from torch to NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec, expert_tensors
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.integrations.transformers.split_experts import SplitExperts, SplitSpec
from hybrid_moe.parallel import for_each
from hybrid_moe.runtime import filling, torch_op


class HybridExperts(torch.nn.Module):
    """Experts of one layer, packed for the CPU, or some of them for a GPU. It has no parameters.

    Takes the same call as the module that it replaces, and runs whatever `experts_implementation`
    says. Until its experts are loaded, `forward` raises.

    Attributes:
        spec: sizes and arithmetic.
        layer: the experts; None before they are loaded.
        formats: theirs, likewise.
    """

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layer: ExpertLayer | SplitExperts | None = None
        self.formats: LayerFormats | None = None
        self._handle = torch_op.Handle(self, _run)

    def allocate(self, options: ExpertsOptions, formats: LayerFormats) -> ExpertLayer:
        """An `ExpertLayer` for this module's sizes with room for every expert, kept here."""
        layer = new_layer(self.spec, options, formats)
        self.layer, self.formats = layer, formats
        return layer

    def allocate_split(
        self, options: ExpertsOptions, formats: LayerFormats, split: SplitSpec
    ) -> SplitExperts:
        """Experts of this module's sizes, in two halves that are still empty, kept here."""
        layer = SplitExperts(self.spec, options, formats, split)
        self.layer, self.formats = layer, formats
        return layer

    def unpack(self, expert: int) -> ExpertTensors:
        """A copy of an expert, bit for bit as it was loaded.

        Raises:
            RuntimeError: nothing is loaded.
        """
        if self.layer is None:
            raise RuntimeError(f"{self.spec.where}: its experts are not loaded")
        return self.layer.unpack(expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [..., H], ids [S, k], weights [S, k] -> like hidden."""
        if torch_op.is_traced(hidden_states):
            return torch_op.experts(hidden_states, top_k_index, top_k_weights, self._handle.value)
        return _run(self, hidden_states, top_k_index, top_k_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridExperts:
        """Packed weights never change, so a copy of the model shares them."""
        copy = HybridExperts(self.spec)
        copy.layer, copy.formats = self.layer, self.formats
        return copy.train(self.training)

    def __getstate__(self) -> Any:
        raise TypeError(f"{self.spec.where}: experts packed by hybrid_moe cannot be pickled")

    def extra_repr(self) -> str:
        s, fmt = self.spec, self.formats.name if self.formats else "not loaded"
        text = f"{s.num_experts} experts, hidden={s.hidden}, intermediate={s.intermediate}, {fmt}"
        if isinstance(self.layer, SplitExperts):
            text += f", {self.layer.wrapper.num_gpu_experts} of them on {self.layer.device}"
        return text


def _run(
    module: HybridExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    if module.layer is None:
        raise RuntimeError(f"{module.spec.where}: forward before its experts are loaded")
    return run_layer(module.layer, module.spec, hidden, ids, weights)


def new_layer(spec: ExpertsSpec, options: ExpertsOptions, formats: LayerFormats) -> ExpertLayer:
    """An empty `ExpertLayer` for `spec`, every expert resident."""
    layer = ExpertLayer(
        formats,
        spec.num_experts,
        spec.hidden,
        spec.intermediate,
        pool=options.pool_config(),
        activation=spec.activation,
        activation_bits=options.activation_bits,
        name=spec.where.partition(" ")[0],
    )
    layer.allocate(np.ones(spec.num_experts, dtype=np.bool_), biases=spec.biased)
    return layer


def experts_nbytes(spec: ExpertsSpec, formats: WeightFormat | LayerFormats) -> int:
    """Bytes that the strips of a module's experts take."""
    return spec.num_experts * packed_nbytes(formats, spec.hidden, spec.intermediate)


def fill(layer: ExpertLayer, module: torch.nn.Module, spec: ExpertsSpec, fmt: WeightFormat) -> None:
    """Load every expert of `module` into `layer`, several at a time."""

    def load(expert: int) -> None:
        layer.load(expert, expert_tensors(module, spec, expert, fmt))

    for_each(range(spec.num_experts), load, min(8, usable_cores()))


def pack_module(
    module: torch.nn.Module, spec: ExpertsSpec, options: ExpertsOptions, split: SplitSpec | None
) -> HybridExperts:
    """The experts of `module`, packed; as `split` tells, if it does."""
    experts = HybridExperts(spec)
    if split is None:
        fill(experts.allocate(options, layer_formats(options.fmt)), module, spec, options.fmt)
    else:
        experts.allocate_split(options, layer_formats(options.fmt), split).load(
            filling.from_experts(
                lambda expert: expert_tensors(module, spec, expert, options.fmt),
                biases=spec.biased,
            )
        )
    return experts


def run_layer(
    layer: ExpertLayer | SplitExperts,
    spec: ExpertsSpec,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The routed experts' sum for hidden [..., H], ids and weights [S, k], in hidden's dtype.

    Activations are BF16: other dtypes are rounded to it. Tensors of another device than the
    layer's are copied there and back. Ids outside 0..E-1 contribute zero: expert parallel runs
    send them.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.shape[-1] != spec.hidden:
        raise ValueError(
            f"{spec.where}: hidden states of size {hidden.shape[-1]}, expected {spec.hidden}"
        )
    rows = hidden.numel() // spec.hidden
    if ids.ndim != 2 or ids.shape[0] != rows or weights.shape != ids.shape:
        raise ValueError(
            f"{spec.where}: ids {tuple(ids.shape)} and weights {tuple(weights.shape)} must both be "
            f"[{rows}, k] for hidden states {tuple(hidden.shape)}"
        )
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        output: torch.Tensor = _InferenceOnly.apply(hidden, layer, ids, weights)  # type: ignore[no-untyped-call]
        return output
    return _compute(hidden, layer, ids, weights)


def _compute(
    hidden: torch.Tensor,
    layer: ExpertLayer | SplitExperts,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What is plain already (CPU, BF16, contiguous) is read where it is."""
    if isinstance(layer, SplitExperts):
        return layer.compute(hidden, ids, weights)
    x = _plain(hidden, torch.bfloat16)
    ids, weights = _plain(ids, torch.int64), _plain(weights, torch.float32)
    out = torch.empty_like(x)
    at = (x.data_ptr(), ids.data_ptr(), weights.data_ptr(), 0, out.data_ptr())
    job = layer.start(Batch(ids.shape[0], ids.shape[1], *at), out)
    if job.missing >= 0:
        raise RuntimeError(f"a token is routed to expert {job.missing}, which is not loaded")
    TOTALS.ignored_ids += job.ignored
    y = job.wait()
    return y if x is hidden else y.to(hidden.device, hidden.dtype)


def _plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as a contiguous tensor of `dtype` on the CPU; itself where it is one."""
    if type(x) is torch.Tensor and x.dtype is dtype and x.is_cpu and x.is_contiguous():
        return x.resolve_neg()
    return x.detach().to("cpu", dtype).resolve_neg().contiguous()


class _InferenceOnly(torch.autograd.Function):
    """Keeps the autograd graph whole, so that a backward pass fails here, by name, instead of
    silently treating the experts as a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        layer: ExpertLayer | SplitExperts,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        return _compute(hidden, layer, ids, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(torch_op.NO_GRADIENT)
