"""Layers as operators of torch: what `torch.compile`, `make_fx` and `torch.export` see as one node.

A layer has a handle, an integer, under which an operator finds it. The operator itself is a node
with a shape rule (its fake), so a graph is captured around it without a break, and the layer runs
as it always does. Eager code calls the layer directly: dispatching an operator costs some 5 us.

    hybrid_moe::experts(hidden, ids, weights, handle) -> like hidden

Handles hold layers weakly: neither a graph nor this module keeps a layer's weights alive. They are
drawn at random, so that a graph that another process saved finds no layer rather than a wrong one.
"""

from __future__ import annotations

import functools
import secrets
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx import _symbolic_trace as fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")

Run = Callable[..., torch.Tensor]
"""Runs a layer: (layer, *what its operator was given but the handle). For `experts` that is hidden,
ids, weights, CUDA stream or None."""

_layers: dict[int, tuple[weakref.ReferenceType[Any], Run]] = {}


class Handle:
    """A layer's place among the operators' layers, given back when the layer is gone.

    A copy of a handle, and a pickle's, is None: the copied layer needs one of its own.

    Attributes:
        value: the integer that a graph holds.
        run: what it was made with.
    """

    def __init__(self, layer: Any, run: Run) -> None:
        value = secrets.randbits(62)
        while value in _layers:
            value = secrets.randbits(62)
        self.value, self.run = value, run
        _layers[value] = (weakref.ref(layer, lambda _: _layers.pop(value, None)), run)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __copy__(self) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def is_traced(x: torch.Tensor | None) -> bool:
    """Whether a graph is being captured, so that an operator must stand for the layer.

    True inside `torch.compile`, `torch.export` and `torch.jit.trace`, under every mode that looks
    at operators (`make_fx`, fake tensors), and under transforms of `torch.func`, whose tensors have
    no address.
    """
    return (
        torch.compiler.is_compiling()
        or (type(x) is not torch.Tensor and isinstance(x, torch.Tensor))
        or fx._is_fx_tracing_flag  # make_fx above the level of modes, `pre_dispatch`
        or _get_current_dispatch_mode() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which breaks the graph where TorchDynamo captures one. See `runtime.untraced` for
    why it must not be followed instead."""
    if not torch.compiler.is_compiling():
        return function
    from hybrid_moe.runtime.untraced import call

    return functools.partial(call, function)


def experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    handle: int,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    """The routed experts of the layer under `handle`, as one node of a graph.

    Args:
        hidden: [..., H].
        ids: [S, k], S the rows of `hidden`.
        weights: [S, k].
        handle: `Handle.value` of the layer.
        cuda_stream: for layers that take one.

    Returns:
        A new contiguous tensor of `hidden`'s shape, dtype and device.

    Raises:
        RuntimeError: there is no such layer (any more); backward.
    """
    output: torch.Tensor = torch.ops.hybrid_moe.experts.default(
        hidden, ids, weights, handle, cuda_stream
    )
    return output


def find(handle: int) -> tuple[Any, Run]:
    """The layer under `handle`, and what runs it. Raises RuntimeError if there is none."""
    reference, run = _layers.get(handle, (None, None))
    layer = None if reference is None else reference()
    if layer is None or run is None:
        raise RuntimeError(
            f"no layer of hybrid_moe has the handle {handle} in this process: the layer has been "
            "freed, or this graph was captured in another process; capture it again from the model"
        )
    return layer, run


@torch.library.custom_op(
    "hybrid_moe::experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor ids, Tensor weights, SymInt handle, SymInt? cuda_stream=None)"
    " -> Tensor",
)
def _experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    handle: int,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    layer, run = find(handle)
    return run(layer, hidden, ids, weights, cuda_stream).contiguous()


@_experts.register_fake
def _(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    handle: int,
    cuda_stream: int | None = None,
) -> torch.Tensor:
    # No look-up: a graph may be captured with handles as symbols, and checks belong to the layer.
    return hidden.new_empty(hidden.shape)


# A gradient is refused when it is computed, not when it is planned: `torch.compile` plans the
# backward pass of every graph whose inputs require gradients, also of one that never runs it.


@torch.library.custom_op(
    "hybrid_moe::no_gradient", mutates_args=(), schema="(Tensor grad, Tensor like) -> Tensor"
)
def _no_gradient(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(NO_GRADIENT)


@_no_gradient.register_fake
def _(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like)


NO_GRADIENT = "layers that run through hybrid_moe have no gradient: inference only"


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, _, weights, _, _ = inputs
    ctx.save_for_backward(hidden, weights)


def _refuse(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    refuse = torch.ops.hybrid_moe.no_gradient.default
    hidden, weights = (
        refuse(grad, x) if needed else None
        for x, needed in zip(
            ctx.saved_tensors, (ctx.needs_input_grad[0], ctx.needs_input_grad[2]), strict=True
        )
    )
    return hidden, None, weights, None, None


_experts.register_autograd(_refuse, setup_context=_keep_inputs)
