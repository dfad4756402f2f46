"""Whether compiled code may read a tensor where it is, and nothing of torch watches."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from hybrid_moe.runtime.torch_op import is_traced


def is_plain(x: Any) -> bool:
    """A tensor or parameter of no subclass, BF16, contiguous, in the CPU's memory."""
    return (
        type(x) in (torch.Tensor, Parameter)
        and x.dtype is torch.bfloat16
        and x.is_cpu
        and x.is_contiguous()
    )


def only_computes(x: torch.Tensor) -> bool:
    """Neither gradients, nor autocast, nor a graph that is captured: operations on `x` are nothing
    but their results."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not is_traced(x)
