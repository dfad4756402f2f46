"""The module that stands where a linear layer was."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.integrations.transformers.dense.held import HeldMatrix
from hybrid_moe.integrations.transformers.dense.packed_module import PackedModule
from hybrid_moe.integrations.transformers.dense.shared_input import MOST_ELEMENTS, SharedInput
from hybrid_moe.integrations.transformers.dense.weight import parameter
from hybrid_moe.runtime import dense_op, torch_op

_Tensor, _BF16, _STRIDED = torch.Tensor, torch.bfloat16, torch.strided
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


class HybridLinear(PackedModule, torch.nn.Linear):
    """A linear layer whose weight is packed for the CPU: y = x W^T + b.

    It is a `torch.nn.Linear` to whoever asks (PEFT does). Its `weight`, and `bias` where there is
    one, are `PackedWeight`s: reading them unpacks, writing is refused. Activations are BF16: an
    input of another float dtype is rounded, and the output has the input's dtype (under autocast
    that which autocast asks for). Tensors of other devices are copied to the CPU and back.
    Inference only: a gradient through it is refused. `load_state_dict` packs a whole new weight,
    quantised where the strips are.
    """

    def __init__(self, matrix: PackedMatrix, where: str, dtype: torch.dtype) -> None:
        """Take a packed matrix, which may be loaded later; until then `forward` raises, and
        `state_dict` has no weight.

        Args:
            matrix: [out_features, in_features], with the bias.
            where: the module's name in its model, for messages.
            dtype: of `weight`: what the model is in.
        """
        torch.nn.Module.__init__(self)
        self._take(HeldMatrix(matrix, where, dtype), _run)
        self.in_features, self.out_features = matrix.inputs, matrix.rows
        self._shared: SharedInput | None = None
        self._fix_parameters(
            weight=parameter(self._held),
            bias=parameter(self._held, bias=True) if matrix.has_bias else None,
        )

    @property
    def matrix(self) -> PackedMatrix:
        """The packed matrix; another one after `load_state_dict`."""
        return self._held.matrix

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features].

        Raises:
            TypeError: no dense float tensor. ValueError: another size.
            RuntimeError: its weights are not loaded, or this is a forked child.
        """
        if (
            not torch_op.is_traced(input)
            and type(input) is _Tensor
            and input.dtype is _BF16
            and input.is_cpu
            and input.layout is _STRIDED
            and not input.is_nested
            and input.is_contiguous()
            and not input.is_neg()
            and not (input.requires_grad and _is_grad_enabled())
            and not _is_autocast_enabled("cpu")
            and forward_ad._current_level < 0
            and (shape := input.shape)
            and shape[-1] == self.in_features
        ):
            # What an input of a model is: nothing here costs more than it must
            elements, held = input.numel(), self._held
            if (shared := self._shared) is not None and 0 < elements <= MOST_ELEMENTS:
                part = shared.output(held, input)
                if part is not None:
                    return part
            *lead, inputs = shape
            layer = held.layer or held.open()
            out = input.new_empty((*lead, self.out_features))
            tokens = elements // inputs
            return layer.start(tokens, input.data_ptr(), out.data_ptr(), out, input).wait()
        return self._general(input)

    def _general(self, x: Any) -> torch.Tensor:
        """Every other kind of input, or an error that names it."""
        if not isinstance(x, torch.Tensor):
            name = type(x).__name__
            raise TypeError(f"{self._held.where}: the input must be a tensor, not {name}")
        device = x.device.type
        if (
            torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
            and x.is_floating_point()
            and x.dtype is not torch.float64  # as autocast has it
        ):
            x = x.to(torch.get_autocast_dtype(device))
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(f"{self._held.where}: {torch_op.NO_GRADIENT}")
        if torch_op.is_traced(x) or x.is_meta:
            return dense_op.linear(x, self._handle.value, self.out_features)
        if x.requires_grad and torch.is_grad_enabled():
            output: torch.Tensor = _InferenceOnly.apply(x, self)  # type: ignore[no-untyped-call]
            return output
        return _run(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.matrix.fmt.name}"


def _run(module: HybridLinear, x: torch.Tensor) -> torch.Tensor:
    """Any values: what is not plain is copied."""
    held = module._held
    if not x.is_floating_point() or x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{held.where}: the input must be a dense float tensor, not {x.dtype}")
    if not x.dim() or x.shape[-1] != module.in_features:
        raise ValueError(
            f"{held.where}: input of shape {tuple(x.shape)}, expected [..., {module.in_features}]"
        )
    layer = held.layer or held.open()
    bits = x.detach().to("cpu", torch.bfloat16).resolve_neg().contiguous()
    shape = (*x.shape[:-1], module.out_features)
    out = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    tokens = bits.numel() // module.in_features
    layer.start(tokens, bits.data_ptr(), out.data_ptr(), out, bits).wait()
    return out.to(x.device, x.dtype)


class _InferenceOnly(torch.autograd.Function):
    """Keeps the autograd graph whole, so that a backward pass fails here, by name, instead of
    silently treating the layer as a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: HybridLinear) -> torch.Tensor:
        ctx.where = module._held.where
        return _run(module, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{ctx.where}: {torch_op.NO_GRADIENT}")


def share_inputs(model: torch.nn.Module) -> None:
    """Let the linear layers of each parent find out which of them take the same input (q, k and v),
    to be one job from then on; see `shared_input`. To be called once all layers are in place;
    layers that are added later compute alone. What wraps a layer afterwards (PEFT) changes nothing.
    """
    for parent in model.modules():
        groups: dict[tuple[Any, ...], list[HybridLinear]] = {}
        for child in parent.children():
            if isinstance(child, HybridLinear):
                m = child.matrix
                groups.setdefault((m.inputs, m.fmt.name, m.pool), []).append(child)
        for children in groups.values():
            if len(children) > 1:
                shared = SharedInput()
                for child in children:
                    child._shared = shared
