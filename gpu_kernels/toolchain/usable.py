"""Whether kernels can be compiled and launched here, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid_moe import binary_cache
from hybrid_moe.gpu_kernels.definition import ARCHITECTURES
from hybrid_moe.gpu_kernels.toolchain.architectures import architecture_of
from hybrid_moe.gpu_kernels.toolchain.kernel_sources import DSL, TESTED_DSL, dsl_version

DRIVER_FILES = tuple(map(Path, ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")))
"""One of them is there where NVIDIA's driver is: on Linux, in containers, under WSL."""


@dataclass(frozen=True)
class Availability:
    """Attributes:
    usable: whether the kernels run on a GPU here.
    reason: why or why not; a sentence without its full stop.
    """

    usable: bool
    reason: str


def availability() -> Availability:
    """Of the first GPU that torch sees. Imports torch only where there is a driver."""
    if not any(file.exists() for file in DRIVER_FILES):
        return _no(f"there is no NVIDIA GPU, or its driver is not loaded (no {DRIVER_FILES[0]})")
    import torch

    if torch.version.cuda is None:
        return _no(f"this torch ({torch.__version__}) is built without CUDA")
    if not torch.cuda.is_available():
        return _no("torch finds no GPU that it can use")
    name = torch.cuda.get_device_name(0)
    capability = torch.cuda.get_device_capability(0)
    arch = architecture_of(capability)
    if arch is None:
        return _no(
            f"{name} has compute capability {capability[0]}.{capability[1]}; there are kernels for "
            + ", ".join(ARCHITECTURES)
        )
    if dsl_version() is None and not binary_cache.has_any("cubin"):
        return _no(f'{DSL} is not installed: pip install "hybrid-moe[gpu]"')
    return _with_driver(name, arch)


def _with_driver(name: str, arch: str) -> Availability:
    from hybrid_moe.gpu_kernels.toolchain.cuda_driver import driver

    version = dsl_version() or TESTED_DSL

    try:
        of_driver = driver().version()
    except RuntimeError as error:
        return _no(str(error))
    needed = int(version.rpartition("cu")[2])
    if of_driver[0] < needed:  # code of a CUDA release runs on every driver of its major version
        return _no(
            f"the driver is for CUDA {of_driver[0]}.{of_driver[1]}, {DSL} {version} needs one for "
            f"CUDA {needed}.0 or later"
        )
    return Availability(
        True,
        f"{name} runs kernels for {arch}, compiled by {DSL} {version}"
        + ("" if dsl_version() else "; it is not installed, so these are what the cache has"),
    )


def _no(reason: str) -> Availability:
    return Availability(False, reason)
