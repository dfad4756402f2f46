"""The tensors of one call of a layer, checked.

Only what torch knows without reading values is checked here: values may live on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrid_moe.runtime.arguments import LayerShape

_Tensor = torch.Tensor
_BF16, _INT64, _FLOAT32, _STRIDED = torch.bfloat16, torch.int64, torch.float32, torch.strided
_is_grad_enabled = torch.is_grad_enabled
ID_TYPES = (torch.int64, torch.int32)


def is_plain(hidden: Any, ids: Any, weights: Any, shape: LayerShape) -> bool:
    """Whether compiled code may read a call's tensors as they are: of the right shapes, contiguous,
    on the CPU, and of the types that it works with. What is not plain may still be right."""
    return (
        type(hidden) is type(ids) is type(weights) is _Tensor
        and hidden.dtype is _BF16
        and ids.dtype is _INT64
        and weights.dtype is _FLOAT32
        and hidden.is_cpu
        and ids.is_cpu
        and weights.is_cpu
        and hidden.layout is ids.layout is weights.layout is _STRIDED
        and not (hidden.is_nested or ids.is_nested or weights.is_nested)
        and not (_is_grad_enabled() and (hidden.requires_grad or weights.requires_grad))
        and not (hidden.is_neg() or weights.is_neg())
        and hidden.is_contiguous()
        and ids.is_contiguous()
        and weights.is_contiguous()
        and len(routing := ids.shape) == 2
        and routing[1] == shape.num_experts_per_tok
        and weights.shape == routing
        and hidden.shape == (routing[0], shape.hidden_size)
    )


def check_call(
    hidden: Any, ids: Any, weights: Any, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of a call, or an error that names the one that is wrong and what is right.

    Raises:
        TypeError: not a tensor, or a dtype other than documented for `KTMoEWrapper.submit_forward`.
        ValueError: a shape or a device.
        RuntimeError: autograd would need a gradient.
    """
    H, k = shape.hidden_size, shape.num_experts_per_tok
    for name, tensor in (("hidden_states", hidden), ("topk_ids", ids), ("topk_weights", weights)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, not sparse or nested")
    if hidden.dtype != torch.bfloat16:
        raise TypeError(
            f"hidden_states has dtype {hidden.dtype}, must be torch.bfloat16: "
            "pass hidden_states.to(torch.bfloat16)"
        )
    if ids.dtype not in ID_TYPES:
        raise TypeError(f"topk_ids has dtype {ids.dtype}, must be torch.int64 or torch.int32")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"topk_weights has dtype {weights.dtype}, must be a float type")
    if hidden.dim() != 2 or hidden.shape[1] != H:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden.shape)}, must be (tokens, {H}): "
            f"hidden_size is {H}"
        )
    B = hidden.shape[0]
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tuple(tensor.shape) != (B, k):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, must be ({B}, {k}): {B} tokens and "
                f"num_experts_per_tok {k}"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, must be on {hidden.device} like hidden_states"
            )
    if hidden.device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden_states is on {hidden.device}, must be on the CPU or a CUDA GPU")
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        raise RuntimeError(
            "the experts have no gradient: call under torch.inference_mode() or torch.no_grad()"
        )
    return hidden, ids, weights


def plain(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A checked call's CPU tensors as plain ones, copied where they are not."""
    return (
        hidden.detach().resolve_neg().contiguous(),
        ids.resolve_neg().to(torch.int64).contiguous(),
        weights.detach().resolve_neg().to(torch.float32).contiguous(),
    )
