"""One call of a layer: its tensors checked, and the job that computes it on CPU tensors.

Only what torch knows without reading values is checked here. Values may live on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.runtime.arguments import LayerShape

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.job import Job
    from hybrid_moe.cpu_kernels.layer import ExpertLayer
    from hybrid_moe.streams.interface import Stream

logger = logging.getLogger(__name__)

_Tensor = torch.Tensor
_BF16, _INT64, _FLOAT32, _STRIDED = torch.bfloat16, torch.int64, torch.float32, torch.strided
ID_TYPES = (torch.int64, torch.int32)


class Launched(Protocol):
    """A started job of `tokens` tokens, on whatever device its inputs were."""

    @property
    def tokens(self) -> int: ...

    def result(self, stream: Stream | None = None) -> torch.Tensor:
        """The output, BF16 [tokens, H] on the inputs' device, owned by the caller."""

    def discard(self) -> None:
        """Let the job end and drop its result."""


def discard(job: Launched | None, layer_idx: int) -> None:
    """Drop a job that nobody will ask for."""
    if job is not None:
        end_quietly(job.discard, layer_idx)


def end_quietly(end: Callable[[], None], layer_idx: int) -> None:
    """End a job that nobody will ask for; what went wrong in it is logged and raised nowhere."""
    try:
        end()
    except RuntimeError as error:
        logger.warning("layer %d: a job that was dropped had failed: %s", layer_idx, error)


@dataclass(frozen=True)
class DirectJob:
    """A job on CPU tensors."""

    job: Job
    tokens: int

    def result(self, stream: Stream | None = None) -> torch.Tensor:
        """Wait for the output. Raises `RuntimeError` on a worker's error."""
        return torch.from_numpy(self.job.wait().view(np.int16)).view(torch.bfloat16)

    def discard(self) -> None:
        """Wait, and drop the output."""
        self.job.wait()


@dataclass(frozen=True)
class NothingToDo:
    """The job of a layer without a loaded expert: all of them are on the GPU."""

    like: torch.Tensor

    @property
    def tokens(self) -> int:
        return int(self.like.shape[0])

    def result(self, stream: Stream | None = None) -> torch.Tensor:
        """Zeros."""
        if stream is None:
            return torch.zeros_like(self.like)
        with stream:
            return torch.zeros_like(self.like)

    def discard(self) -> None:
        """Nothing runs."""


def submit_direct(
    layer: ExpertLayer,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    skip: npt.NDArray[np.bool_],
) -> DirectJob:
    """Start a layer on checked CPU tensors; they may be changed as soon as this returns."""
    x = hidden.detach().view(torch.int16).contiguous().numpy().view(np.uint16)
    job = layer.submit(
        x,
        ids.to(torch.int64).contiguous().numpy(),
        weights.detach().to(torch.float32).contiguous().numpy(),
        skip,
    )
    return DirectJob(job, hidden.shape[0])


def is_plain(hidden: Any, ids: Any, weights: Any) -> bool:
    """Whether compiled code may read a call's tensors as they are: on the CPU, contiguous, and of
    the types that it works with. Their shapes are not looked at."""
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
        and not (hidden.requires_grad or weights.requires_grad)
        and not (hidden.is_neg() or weights.is_neg())
        and hidden.is_contiguous()
        and ids.is_contiguous()
        and weights.is_contiguous()
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
