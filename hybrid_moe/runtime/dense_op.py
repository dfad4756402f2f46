"""Linear layers and embeddings with packed weights as operators of torch, see `torch_op`.

hybrid_moe::linear(x, handle, features) -> [..., features] like x
hybrid_moe::embedding(ids, handle, features, dtype) -> [..., features]
"""

from __future__ import annotations

from typing import Any

import torch

from hybrid_moe.runtime import torch_op


def linear(x: torch.Tensor, handle: int, features: int) -> torch.Tensor:
    """The linear layer under `handle`, as one node of a graph.

    Args:
        x: [..., K].
        handle: `Handle.value` of the layer.
        features: N.

    Returns:
        A new contiguous tensor [..., N] of `x`'s dtype and device.

    Raises:
        RuntimeError: there is no such layer (any more); backward.
    """
    output: torch.Tensor = torch.ops.hybrid_moe.linear.default(x, handle, features)
    return output


def embedding(ids: torch.Tensor, handle: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """The embedding under `handle`, as one node of a graph.

    Args:
        ids: int of any shape [...].
        handle: `Handle.value` of the embedding.
        features: K.
        dtype: of the rows.

    Returns:
        [..., K] on `ids`' device.

    Raises:
        RuntimeError: there is no such embedding (any more).
    """
    output: torch.Tensor = torch.ops.hybrid_moe.embedding.default(ids, handle, features, dtype)
    return output


@torch.library.custom_op(
    "hybrid_moe::linear",
    mutates_args=(),
    schema="(Tensor x, SymInt handle, SymInt features) -> Tensor",
)
def _linear(x: torch.Tensor, handle: int, features: int) -> torch.Tensor:
    module, run = torch_op.find(handle)
    return run(module, x).contiguous()


@_linear.register_fake
def _(x: torch.Tensor, handle: int, features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], features))


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _refuse(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.hybrid_moe.no_gradient.default(grad, x), None, None


_linear.register_autograd(_refuse, setup_context=_keep_input)


@_linear.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, handle: int, features: int
) -> tuple[torch.Tensor, int]:
    return linear(x.movedim(in_dims[0] or 0, 0), handle, features), 0


@torch.library.custom_op(
    "hybrid_moe::embedding",
    mutates_args=(),
    schema="(Tensor ids, SymInt handle, SymInt features, ScalarType dtype) -> Tensor",
)
def _embedding(ids: torch.Tensor, handle: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    module, run = torch_op.find(handle)
    return run(module, ids).contiguous()


@_embedding.register_fake
def _(ids: torch.Tensor, handle: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, features), dtype=dtype)


@_embedding.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], ids: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, int]:
    return embedding(ids.movedim(in_dims[0] or 0, 0), *rest), 0
