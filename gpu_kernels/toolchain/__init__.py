"""From a kernel's definition to work on a GPU: compiled elsewhere, cached, launched by the driver.

Nothing here imports CuTe DSL in this process, or CUDA before the first launch.
"""

from hybrid_moe.gpu_kernels.toolchain.binaries import KernelBinary, compiled, warm
from hybrid_moe.gpu_kernels.toolchain.compile_process import CompileError
from hybrid_moe.gpu_kernels.toolchain.launching import launch, prepare
from hybrid_moe.gpu_kernels.toolchain.usable import Availability, availability

__all__ = [
    "Availability",
    "CompileError",
    "KernelBinary",
    "availability",
    "compiled",
    "launch",
    "prepare",
    "warm",
]
