"""RMS norms of few tokens in one compiled pass, with the bits of their module.

A norm of one token takes torch six operations, 20 us where the arithmetic takes 1. A module is
recognised by what it computes (`recognise_norm`): on random rows and weights, a style of
`kernels.rms_norm` must give the bits that the module gives. It then keeps its class, its weight and
its name; what changes is `forward`, for small BF16 tensors in inference. Everything else (long
prompts, gradients, graphs, autocast, other dtypes and devices) runs the module's own.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.nn import Parameter

from hybrid_moe.cpu_kernels.kernels.rms_norm import LANES, MOST_INPUTS, STYLES
from hybrid_moe.cpu_kernels.row_functions import RowFunction, row_functions
from hybrid_moe.integrations.transformers.step.plain import is_plain, only_computes

_log = logging.getLogger(__name__)

MOST_ELEMENTS = 1 << 15
"""Of a tensor: from here on torch (`at::internal::GRAIN_SIZE`) uses several threads, and may sum in
another order."""

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Attributes that hold epsilon."""

_SPEC = "_hybrid_moe_norm"


@dataclass(frozen=True)
class NormSpec:
    """What a recognised module computes.

    Attributes:
        function: the compiled norm of its style.
        inputs: of a row.
        weight_dtype: of its weight.
        attribute, value: where the module has its epsilon, and what that was.
        epsilon: the same as a float32 in memory.
    """

    function: RowFunction
    inputs: int
    weight_dtype: torch.dtype
    attribute: str
    value: float
    epsilon: ctypes.c_float

    def __deepcopy__(self, memo: dict[int, Any]) -> NormSpec:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def replace_norms(model: torch.nn.Module) -> int:
    """Let the norms of `model` that are recognised run compiled; returns how many."""
    known: dict[Any, NormSpec | None] = {}
    replaced = 0
    for module in model.modules():
        key = _key(module)
        if key is None:
            continue
        if key not in known:
            known[key] = recognise_norm(module)
        spec = known[key]
        if spec is not None:
            module.__dict__[_SPEC] = spec
            module.__dict__["forward"] = MethodType(_forward, module)
            replaced += 1
    return replaced


def _key(module: torch.nn.Module) -> Any:
    """What a norm depends on but for its weight's values; None for what is no norm: of one weight
    per input, and with an epsilon. One whose `forward` has been replaced already is left alone."""
    weight = module._parameters.get("weight")
    if (
        type(weight) is not Parameter
        or weight.ndim != 1
        or len(module._parameters) > 1
        or module._buffers
        or module._modules
        or "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
    ):
        return None
    simple = {n: v for n, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
    simple.pop("training", None)
    if not any(isinstance(simple.get(name), float) for name in _EPSILONS):
        return None
    return type(module), weight.dtype, len(weight), tuple(sorted(simple.items(), key=str))


def recognise_norm(module: torch.nn.Module) -> NormSpec | None:
    """The style that gives the module's bits on random rows and weights, or None.

    Rows have ordinary values, large ones, and such that epsilon matters; the weights are random, as
    those of the module may not be loaded yet.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    inputs, dtype = len(weight), weight.dtype
    attribute = next(n for n in _EPSILONS if isinstance(getattr(module, n, None), float))
    value = float(getattr(module, attribute))
    widths = {torch.bfloat16: 2, torch.float32: 4}
    if dtype not in widths or inputs % LANES or inputs > min(MOST_INPUTS, MOST_ELEMENTS // 2):
        return None
    epsilon = ctypes.c_float(value)
    functions = row_functions()
    candidates = [n for n, style in STYLES.items() if style.weight_bytes == widths[dtype]]
    specs = [NormSpec(functions[n], inputs, dtype, attribute, value, epsilon) for n in candidates]
    for x, random in _probes(inputs, dtype, value):
        computed = _own(module, x, random)
        if computed is None or computed.dtype != x.dtype or computed.shape != x.shape:
            return None
        specs = [spec for spec in specs if torch.equal(run_norm(spec, x, random), computed)]
    return specs[0] if specs else None


def _probes(
    inputs: int, dtype: torch.dtype, epsilon: float
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Rows [1, R, N] and weights [N]."""
    rng = torch.Generator(device="cpu").manual_seed(0)
    shapes = ((1, 1.0), (1, 100.0), (min(8, (MOST_ELEMENTS - 1) // inputs), epsilon**0.5))
    for rows, scale in shapes:
        x = torch.randn((1, rows, inputs), generator=rng, device="cpu", dtype=torch.float32) * scale
        weight = torch.randn(inputs, generator=rng, device="cpu", dtype=torch.float32)
        yield x.to(torch.bfloat16), weight.to(dtype)


def _own(module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """What the module makes of rows with another weight; None if it takes more than rows."""
    try:
        with torch.inference_mode():
            result = torch.func.functional_call(module, {"weight": weight}, (x,))
    except Exception as error:  # whatever somebody's module does with rows alone
        _log.debug("%s is no norm that runs compiled: %s", type(module).__name__, error)
        return None
    return result if isinstance(result, torch.Tensor) else None


def run_norm(spec: NormSpec, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm of bf16 rows [..., N] that are contiguous on the CPU, as is `weight` [N]."""
    out = torch.empty_like(x)
    inputs = spec.inputs
    spec.function(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // inputs,
        inputs,
        ctypes.addressof(spec.epsilon),
    )
    return out


def _forward(self: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
    spec: NormSpec | None = self.__dict__[_SPEC]
    if spec is not None and len(inputs) == 1 and not named and _applies(self, spec, inputs[0]):
        return run_norm(spec, inputs[0], self._parameters["weight"])  # type: ignore[arg-type]
    return type(self).forward(self, *inputs, **named)


def _applies(module: torch.nn.Module, spec: NormSpec, x: Any) -> bool:
    """Whether a compiled norm may stand for the module's own on `x`."""
    weight = module._parameters.get("weight")  # absent where it is parametrized
    return (
        type(x) is torch.Tensor
        and is_plain(x)
        and 0 < x.numel() < MOST_ELEMENTS
        and x.shape[-1] == spec.inputs
        and type(weight) is Parameter
        and weight.dtype is spec.weight_dtype
        and weight.is_cpu
        and weight.shape == (spec.inputs,)
        and weight.is_contiguous()
        and module.__dict__.get(spec.attribute) == spec.value
        and only_computes(x)
    )
