"""CUDA streams as `streams.interface` describes them, on torch and the libraries it has loaded.

Host functions and memory flags go through `cudaLaunchHostFunc` and the driver's stream memory
operations, which torch does not offer. Nothing here runs at import, and nothing but a call with
CUDA tensors imports this file.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

from hybrid_moe.shared_libraries import loaded_library
from hybrid_moe.streams.interface import Event

T = TypeVar("T")

_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_NON_BLOCKING = 1  # cudaStreamNonBlocking: never waits for the legacy default stream
_WAIT_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_WRITE_AFTER_ALL = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: behind a memory barrier


@functools.cache
def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch uses, with its signatures."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    library = loaded_library("libcudart.so")
    library.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cudaLaunchHostFunc.restype = ctypes.c_int
    library.cudaStreamCreateWithFlags.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
    library.cudaStreamCreateWithFlags.restype = ctypes.c_int
    library.cudaGetErrorString.argtypes = [ctypes.c_int]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaThreadExchangeStreamCaptureMode.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.cudaThreadExchangeStreamCaptureMode.restype = ctypes.c_int
    return library


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver, with the signatures of its stream memory operations.

    Raises:
        AttributeError: it is older than CUDA 11.7 and has none that work everywhere.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    library = loaded_library("libcuda.so")
    for name in ("cuStreamWriteValue64_v2", "cuStreamWaitValue64_v2"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
        function.restype = ctypes.c_int
    library.cuMemHostGetDevicePointer_v2.argtypes = [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_void_p,
        ctypes.c_uint,
    ]
    library.cuMemHostGetDevicePointer_v2.restype = ctypes.c_int
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuGetErrorName.restype = ctypes.c_int
    library.cuDeviceGetAttribute.argtypes = [
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.cuDeviceGetAttribute.restype = ctypes.c_int
    return library


def check_runtime(call: str, code: int) -> None:
    """Raise `RuntimeError` with the runtime's words if `code` is an error."""
    if code != 0:
        message = runtime().cudaGetErrorString(code).decode()
        raise RuntimeError(f"{call} failed: {message} (error {code})")


def check_driver(call: str, code: int) -> None:
    """Raise `RuntimeError` with the driver's name of the error if `code` is one."""
    if code != 0:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{call} failed: {(name.value or b'unknown').decode()} (error {code})")


def relaxed(allocate: Callable[[], T]) -> T:
    """What `allocate` returns. Under capture the runtime forbids allocations to threads that have
    not asked for the relaxed mode."""
    mode = ctypes.c_int(_RELAXED)
    runtime().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        return allocate()
    finally:
        runtime().cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@functools.lru_cache(maxsize=4096)
def device_address(address: int) -> int:
    """Where the GPU finds pinned host memory."""
    result = ctypes.c_uint64()
    code = driver().cuMemHostGetDevicePointer_v2(ctypes.byref(result), address, 0)
    check_driver("cuMemHostGetDevicePointer", code)
    return result.value


@functools.lru_cache(maxsize=1024)
def cuda_stream(device: torch.device, handle: int) -> CudaStream:
    """The stream `handle` (a `cudaStream_t` as int; 0 is the default stream) of `device`."""
    return CudaStream(device, handle)


def new_stream(device: torch.device) -> CudaStream:
    """A stream of our own. torch hands its pool of streams out in turn, to others as well, whose
    work would then end up in our captures."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        code = runtime().cudaStreamCreateWithFlags(ctypes.byref(handle), _NON_BLOCKING)
    check_runtime("cudaStreamCreateWithFlags", code)
    return CudaStream(device, handle.value or 0)


class CudaStream:
    """A CUDA stream. Use `cuda_stream`: equal streams must have the same side stream.

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

    @functools.cached_property
    def side(self) -> CudaStream:
        """A private stream of this one."""
        return relaxed(lambda: new_stream(self.device))

    @property
    def has_flags(self) -> bool:
        """Whether memory flags work on this GPU. They are tried when a stream asks for the first
        time, but not during a capture."""
        from hybrid_moe.streams.flags import flags_work

        return flags_work(self.device, may_try=not self.capturing())

    def capturing(self) -> bool:
        """Whether a graph is being captured from this stream."""
        with self:
            return bool(torch.cuda.is_current_stream_capturing())

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """New zeroed page-locked host memory."""
        return relaxed(lambda: torch.zeros(shape, dtype=dtype, pin_memory=True))

    def to_host(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of `source` on the device, in the dtype of pinned `target`."""
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

    def record(self, *, timed: bool = False) -> torch.cuda.Event:
        """The point that the stream has reached when all work queued so far is done."""
        event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def passed(self, event: Event) -> bool:
        """Whether `event` has been reached."""
        assert isinstance(event, torch.cuda.Event)
        return bool(event.query())  # type: ignore[no-untyped-call]

    def seconds_between(self, begin: Event, end: Event) -> float:
        """From one timed event to another."""
        assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1e3

    def host_wait(self, event: Event) -> None:
        """Return when `event` has been reached."""
        assert isinstance(event, torch.cuda.Event)
        event.synchronize()

    def wait(self, event: Event) -> None:
        """Let what follows wait for `event`."""
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)

    def host_function(self, function: int, user_data: int) -> None:
        """Queue a call of the compiled function at address `function`.

        Raises:
            RuntimeError: the runtime refused; with its message.
        """
        code = runtime().cudaLaunchHostFunc(self.handle, function, user_data)
        check_runtime("cudaLaunchHostFunc", code)

    def write_value(self, address: int, value: int) -> None:
        """Queue a write of an int64 into pinned memory."""
        target = device_address(address)
        code = driver().cuStreamWriteValue64_v2(self.handle, target, value, _WRITE_AFTER_ALL)
        check_driver("cuStreamWriteValue64", code)

    def wait_value(self, address: int, value: int) -> None:
        """Queue a wait until an int64 in pinned memory is `value`."""
        source = device_address(address)
        code = driver().cuStreamWaitValue64_v2(self.handle, source, value, _WAIT_EQUAL)
        check_driver("cuStreamWaitValue64", code)
