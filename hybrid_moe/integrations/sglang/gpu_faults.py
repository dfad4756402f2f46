"""What to do about a fault on the GPU: one error that says it, where `HYBRID_MOE_GPU` is set.

A GPU out of memory can go on when something is freed. After any other fault of a kernel (an illegal
address, an assertion) the driver refuses the process's every call, and each of them would raise the
same again: the process has to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hybrid_moe.integrations.sglang.gpu_backend import VARIABLE


class GpuMemoryError(RuntimeError):
    """The GPU has no memory left for what a layer needs."""


class GpuLostError(RuntimeError):
    """A kernel failed, and with it the GPU's context: no later call can work."""


def explained(error: Exception, backend: str | None, doing: str) -> Exception:
    """`error`, or what stands for it where it is a fault on the GPU; that is its cause.

    Args:
        backend: see `gpu_backend.chosen`; None leaves every error as it is.
        doing: what met the fault, for the message.
    """
    told: Exception
    if backend is None:
        return error
    if isinstance(error, torch.OutOfMemoryError):
        told = GpuMemoryError(
            f"{doing}: the GPU is out of memory ({_first_line(error)}): put fewer experts there "
            "(--kt-num-gpu-experts, or the placement profile), or leave it more room beside the "
            "cache (a lower --mem-fraction-static, a smaller --chunked-prefill-size)"
        )
    elif isinstance(error, torch.AcceleratorError):
        told = GpuLostError(
            f"{doing}: a kernel failed on the GPU ({_first_line(error)}), and nothing works in "
            "this process any more: restart the server. CUDA_LAUNCH_BLOCKING=1 with "
            "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled names the "
            f"call that failed; with {VARIABLE}=torch, or without it, no kernel of hybrid_moe runs"
        )
    else:
        return error
    told.__cause__ = error
    return told


@contextmanager
def explaining(backend: str | None, doing: str) -> Iterator[None]:
    """Raise what stands for a fault on the GPU within."""
    try:
        yield
    except RuntimeError as error:
        told = explained(error, backend, doing)
        if told is error:
            raise
        raise told from error


def _first_line(error: Exception) -> str:
    """Without the driver's general advice, which follows."""
    return str(error).partition("\n")[0]
