"""A CUDA stream as `hybrid_moe.staging` wants it, on torch and the CUDA runtime torch has loaded.

Host functions go through `cudaLaunchHostFunc`, which torch does not offer. Nothing here runs at
import, and nothing but a call with CUDA tensors imports this file.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import TracebackType

import torch

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


def loaded_library(name: str, maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL:
    """The shared library of this process whose file name begins with `name`.

    A second copy of a runtime would have contexts of its own; so the path is taken from what is
    mapped, never from a search.

    Raises:
        RuntimeError: no such library is loaded.
    """
    for line in maps.read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name):
            return ctypes.CDLL(str(path))
    raise RuntimeError(
        f"no {name} is loaded in this process: CUDA tensors need a torch that is built for CUDA "
        "with the shared CUDA runtime"
    )


@functools.cache
def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch uses, with its signatures."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    library = loaded_library("libcudart.so")
    library.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cudaLaunchHostFunc.restype = ctypes.c_int
    library.cudaGetErrorString.argtypes = [ctypes.c_int]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaThreadExchangeStreamCaptureMode.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.cudaThreadExchangeStreamCaptureMode.restype = ctypes.c_int
    return library


class CudaStream:
    """The stream `handle` (a `cudaStream_t` as int; 0 is the default stream) of `device`.

    Everything is queued on this stream, whatever torch's current stream is: what produced the
    inputs must be ordered before it by the caller, as with kt-kernel.
    """

    def __init__(self, device: torch.device, handle: int) -> None:
        self.device = device
        self.handle = handle
        self._stream = (
            torch.cuda.ExternalStream(handle, device)  # type: ignore[no-untyped-call]
            if handle
            else torch.cuda.default_stream(device)
        )
        self._entered: list[torch.cuda.StreamContext] = []

    def __enter__(self) -> None:
        context = torch.cuda.stream(self._stream)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._entered.append(context)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.pop().__exit__(exc_type, exc, traceback)

    def capturing(self) -> bool:
        """Whether a graph is being captured from this stream."""
        with self:
            return bool(torch.cuda.is_current_stream_capturing())

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """New page-locked host memory; allowed under capture, where the runtime forbids it for
        threads that have not asked for the relaxed mode."""
        mode = ctypes.c_int(_RELAXED)
        runtime().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        finally:
            runtime().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def to_host(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of `source` on the device, in the dtype of pinned `target`."""
        # torch's allocator must not hand out the memory of `source` before the copy is done
        source.record_stream(self._stream)
        target.copy_(source.to(target.dtype).contiguous(), non_blocking=True)

    def to_device(self, source: torch.Tensor) -> torch.Tensor:
        """Queue a copy of pinned `source` into a new device tensor."""
        return torch.empty(source.shape, dtype=source.dtype, device=self.device).copy_(
            source, non_blocking=True
        )

    def add(self, target: torch.Tensor, other: torch.Tensor) -> None:
        """Queue `target += other` on device tensors."""
        with self:
            target.add_(other)

    def host_function(self, function: int, user_data: int) -> None:
        """Queue a call of the compiled function at address `function`.

        Raises:
            RuntimeError: the runtime refused; with its message.
        """
        code = runtime().cudaLaunchHostFunc(self.handle, function, user_data)
        if code != 0:
            message = runtime().cudaGetErrorString(code).decode()
            raise RuntimeError(f"cudaLaunchHostFunc failed: {message} (error {code})")
