"""What goes wrong on a GPU in the hot half, as one error that says what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GpuMemoryError(RuntimeError):
    """A device has no memory left. What is freed can be used: the process can go on."""


class GpuLostError(RuntimeError):
    """A kernel has failed, and with it the device's context: every later call would fail too."""


@contextmanager
def explained(layer_idx: int, device: torch.device, nbytes: int = 0) -> Iterator[None]:
    """Turn torch's errors of a device into one of the layer.

    Args:
        nbytes: of the slots that are being allocated; 0 while something is computed.

    Raises:
        GpuMemoryError: the device has no memory left.
        GpuLostError: it has met an error from which its context does not recover.

    Other errors pass as they are.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{nbytes / 2**30:.2f} GiB of slots" if nbytes else "the experts of this batch"
        raise GpuMemoryError(
            f"layer {layer_idx}: {device} has no memory left for {what}: put fewer experts on the "
            f"GPU (gpu_slots, gpu_experts_mask), or leave it more room ({error})"
        ) from error
    except RuntimeError as error:
        lost = lost_gpu(f"layer {layer_idx}: {device}", error)
        if lost is None:
            raise
        raise lost from error


def lost_gpu(name: str, error: RuntimeError) -> GpuLostError | None:
    """What to raise for an error of the device `name`; None if the device can go on."""
    if not _is_fatal(error):
        return None
    return GpuLostError(
        f"{name} has failed, and this process can use it no more: restart the process; "
        'CUDA_LAUNCH_BLOCKING=1 shows which kernel it was, and gpu_backend="torch" computes '
        f"without our kernels ({error})"
    )


_FATAL = re.compile(
    r"illegal memory access|illegal instruction|misaligned address|invalid program counter"
    r"|hardware stack error|global/shared address space|device-side assert|unspecified launch"
    r"|launch timed out|context is destroyed|uncorrectable|CUDA error: unknown error"
    r"|\(error (?:214|220|700|702|709|710|714|715|716|717|718|719|999)\)"
)
"""What torch, the runtime (`cudaGetErrorString`) and the driver say of errors after which a context
is lost. The others (a capture that forbids something, a device that is not there, memory of the
host) go away with their cause."""


def _is_fatal(error: RuntimeError) -> bool:
    """Whether it is such an error. Only its words tell: torch before 2.8 has no class for them."""
    return _FATAL.search(str(error)) is not None
