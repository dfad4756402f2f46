"""From a kernel's definition to work on a GPU: compiled elsewhere, cached, launched by the driver.

Nothing here imports CuTe DSL in this process, or CUDA before the first launch. The names below are
imported when first used (PEP 562): whether there is a GPU is asked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "Availability": "usable",
    "CompileError": "compile_process",
    "KernelBinary": "binaries",
    "availability": "usable",
    "compiled": "binaries",
    "has_pdl": "launching",
    "launch": "launching",
    "prepare": "launching",
    "warm": "binaries",
    "warm_all": "binaries",
}

__all__ = [
    "Availability",
    "CompileError",
    "KernelBinary",
    "availability",
    "compiled",
    "has_pdl",
    "launch",
    "prepare",
    "warm",
    "warm_all",
]

if TYPE_CHECKING:
    from hybrid_moe.gpu_kernels.toolchain.binaries import KernelBinary, compiled, warm, warm_all
    from hybrid_moe.gpu_kernels.toolchain.compile_process import CompileError
    from hybrid_moe.gpu_kernels.toolchain.launching import has_pdl, launch, prepare
    from hybrid_moe.gpu_kernels.toolchain.usable import Availability, availability


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
