"""A router's logits for one token without what torch does around them, with the same bits.

torch's BF16 product of one row copies the weight into another layout each time: 60 to 120 us warm,
and more between jobs that stream weights through the caches. `kernels.router_logits` adds in the
same order. Whether it has torch's bits on this processor is tried once for each size, with sums
that cancel, so that any other order shows in every logit; else torch computes them. What a router
does with its logits stays torch's.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn import Parameter

from hybrid_moe.cpu_kernels.kernels.router_logits import EXPERTS, INPUTS
from hybrid_moe.cpu_kernels.row_functions import LOGITS, row_functions
from hybrid_moe.integrations.transformers.step.own_globals import looks_up, set_globals
from hybrid_moe.integrations.transformers.step.plain import is_plain, only_computes

_log = logging.getLogger(__name__)

CHUNK = 512
"""Inputs that oneDNN adds up at a time for one row."""

MOST_EXPERTS = 1024


def is_router(module: torch.nn.Module) -> bool:
    """A router is a module with a weight [experts, inputs] that calls `F.linear` itself, and is no
    linear layer."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 2
        and not isinstance(module, torch.nn.Linear)
        and looks_up(module, "F") is F
        and "linear" in type(module).forward.__code__.co_names
    )


def replace_router_logits(model: torch.nn.Module) -> int:
    """Let routers of `model` compute their logits compiled; returns how many."""
    replaced = 0
    for module in model.modules():
        if is_router(module) and _fits(*module._parameters["weight"].shape):  # type: ignore[union-attr]
            set_globals(module, {"F": _functional()})
            replaced += 1
    return replaced


def _fits(experts: int, inputs: int) -> bool:
    return experts % EXPERTS == 0 and inputs % INPUTS == 0 and 0 < experts <= MOST_EXPERTS


class _Functional:
    """`torch.nn.functional` with another `linear`."""

    def __init__(self) -> None:
        vars(self).update({**vars(F), "linear": linear})


@functools.lru_cache(maxsize=1)
def _functional() -> _Functional:
    return _Functional()


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear`."""
    if not (
        is_plain(input)
        and is_plain(weight)
        and (bias is None or (is_plain(bias) and bias.shape == weight.shape[:1]))
        and weight.ndim == 2
        and input.numel() == input.shape[-1] == weight.shape[1]
        and _fits(*weight.shape)
        and only_computes(input)
        and _has_torch_s_bits(*weight.shape, bias is not None)
    ):
        return F.linear(input, weight, bias)
    return _logits(input, weight, bias)


def _logits(
    x: torch.Tensor, weight: torch.Tensor | Parameter, bias: torch.Tensor | None
) -> torch.Tensor:
    experts, inputs = weight.shape
    out = torch.empty((*x.shape[:-1], experts), dtype=torch.bfloat16, device="cpu")
    row_functions()[LOGITS[bias is not None]](
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        experts,
        inputs,
        CHUNK,
    )
    return out


@functools.cache
def _has_torch_s_bits(experts: int, inputs: int, biased: bool) -> bool:
    """Whether they are equal where the second half of each sum is the first, negated, in reverse:
    what remains is rounding, in which every addition counts. And for ordinary values."""
    rng = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32)
        return values.to(torch.bfloat16)

    half = inputs // 2
    for cancelling in (True, True, True, False, False):
        x, weight = random(1, inputs), random(experts, inputs)
        bias = random(experts) if biased else None
        if cancelling:
            x[:, half:] = x[:, :half].flip(1)
            weight[:, half:] = -weight[:, :half].flip(1)
            bias = None if bias is None else bias * 2.0**-20
        if not torch.equal(_logits(x, weight, bias), F.linear(x, weight, bias)):
            _log.info(
                "logits of %d experts of %d inputs stay torch's, which adds in another order here",
                experts,
                inputs,
            )
            return False
    return True
