"""The CUDA driver, as far as kernels need it: load code, find a function, launch it.

By ctypes, on the `libcuda.so.1` that torch has loaded: a launch then needs neither CuTe DSL nor a
compiler nor a package of bindings. Names and values are those of `cuda.h`; tests compare them with
NVIDIA's own bindings.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hybrid_moe.shared_libraries import loaded_library

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_...
OUT_OF_MEMORY = 2  # CUDA_ERROR_...

_TOO_OLD = "the GPU's driver is too old for this CUDA: install a newer driver"
_LOST = (
    "this kernel or an earlier one failed on the GPU, and all work of this process there is lost "
    "with it: start the process again; `compute-sanitizer python ...` finds the kernel"
)
CURES = {
    OUT_OF_MEMORY: (
        "GPU memory is full: give the GPU fewer experts (gpu_experts, gpu_slots) or the KV cache "
        "less memory"
    ),
    34: "libcuda.so is a stub of the CUDA toolkit: the driver's own must be found before it",
    36: _TOO_OLD,
    100: "there is no GPU: look at CUDA_VISIBLE_DEVICES",
    200: "the GPU cannot run this code, which is for another architecture",
    209: "the GPU cannot run this code, which is for another architecture",
    **dict.fromkeys((700, 714, 715, 716, 717, 718, 719), _LOST),
    701: "the kernel needs more registers or shared memory than this GPU has for a block",
    702: "the kernel ran longer than the GPU's watchdog allows: use a GPU without a display",
    803: "the driver's kernel module and its library differ in version: reboot after an update",
    **dict.fromkeys(
        (900, 901, 905, 906),
        "a CUDA graph is being captured, which forbids it: run the model once before capturing",
    ),
}
"""Code of an error -> what it means and what to do."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes, of which one int is used."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


_HANDLE = ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES: dict[str, list[Any]] = {
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDriverGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "cuDevicePrimaryCtxRetain": [_HANDLE, ctypes.c_int],
    "cuCtxGetCurrent": [_HANDLE],
    "cuCtxPushCurrent_v2": [ctypes.c_void_p],
    "cuCtxPopCurrent_v2": [_HANDLE],
    "cuThreadExchangeStreamCaptureMode": [ctypes.POINTER(ctypes.c_int)],
    "cuModuleLoadData": [_HANDLE, ctypes.c_char_p],
    "cuModuleGetFunction": [_HANDLE, ctypes.c_void_p, ctypes.c_char_p],
    "cuFuncSetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    "cuLaunchKernelEx": [
        ctypes.POINTER(LaunchConfig),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    ],
}


class CudaDriver:
    """Calls of the driver, errors as exceptions.

    Args:
        library: `libcuda.so.1`; tests give a stand-in.
    """

    def __init__(self, library: Any) -> None:
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise RuntimeError(f"the driver has no {name}: {_TOO_OLD}") from None
            function.argtypes = arguments
            function.restype = ctypes.c_int
        self.library = library
        self._contexts: dict[int, int] = {}

    def check(self, code: int, what: str) -> None:
        """Raise if `code` is an error.

        Raises:
            torch.OutOfMemoryError, RuntimeError: `what` was done, the driver's name of the error,
                and what to do about it.
        """
        if code == 0:
            return
        name = ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(name))
        words = (name.value or b"an unknown error").decode()
        cure = CURES.get(code)
        kind = torch.OutOfMemoryError if code == OUT_OF_MEMORY else RuntimeError
        raise kind(f"{what}: {words} (error {code})" + (f": {cure}" if cure else ""))

    def version(self) -> tuple[int, int]:
        """The CUDA that the driver is made for, (12, 9)."""
        version = ctypes.c_int()
        self.check(self.library.cuDriverGetVersion(ctypes.byref(version)), "asking its version")
        return version.value // 1000, version.value % 1000 // 10

    def context(self, device: int) -> int:
        """The context of `device` that torch uses too."""
        if device not in self._contexts:
            handle = ctypes.c_void_p()
            code = self.library.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device)
            self.check(code, f"using GPU {device}")
            self._contexts[device] = handle.value or 0
        return self._contexts[device]

    @contextmanager
    def within(self, context: int) -> Iterator[None]:
        """Make `context` this thread's for a while. A thread that has not used the GPU has none."""
        self.check(self.library.cuCtxPushCurrent_v2(context), "changing the context")
        try:
            yield
        finally:
            old = ctypes.c_void_p()
            self.check(self.library.cuCtxPopCurrent_v2(ctypes.byref(old)), "changing the context")

    def load(self, cubin: bytes, entry: str, what: str) -> int:
        """The function `entry` of `cubin` in this thread's context. Also while a graph is captured,
        since what is loaded is no part of the stream's work.

        Args:
            what: for messages.
        """
        mode = ctypes.c_int(_RELAXED)
        self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            code = self.library.cuModuleLoadData(ctypes.byref(module), cubin)
            self.check(code, f"loading {what}")
            code = self.library.cuModuleGetFunction(
                ctypes.byref(function), module.value, entry.encode()
            )
            self.check(code, f"finding {entry} of {what}")
        finally:
            self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        return function.value or 0


@functools.cache
def driver() -> CudaDriver:
    """The driver that torch uses.

    Raises:
        RuntimeError: torch has none, or it is too old.
    """
    torch.cuda.init()
    return CudaDriver(loaded_library("libcuda.so"))
