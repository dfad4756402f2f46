"""What is asked of the CUDA runtime and driver, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_moe.streams import cuda


def test_library_is_found_among_the_loaded_ones() -> None:
    libc = cuda.loaded_library("libc.so")
    assert libc.getpid() > 0
    with pytest.raises(RuntimeError, match="no libdoes_not_exist is loaded"):
        cuda.loaded_library("libdoes_not_exist")


class FakeRuntime:
    """Remembers calls; `code` is what they return."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.launched: list[tuple[int, int, int]] = []
        self.mode = 0  # of this thread: global

    def cudaLaunchHostFunc(self, stream: int, function: int, user_data: int) -> int:  # noqa: N802
        self.launched.append((stream, function, user_data))
        return self.code

    def cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return b"operation not permitted when stream is capturing"

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        box = mode._obj
        self.mode, box.value = box.value, self.mode
        return 0


def cuda_stream(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> cuda.CudaStream:
    monkeypatch.setattr(cuda, "runtime", lambda: runtime)
    stream = object.__new__(cuda.CudaStream)  # without the device that its constructor asks for
    stream.handle, stream.device = 77, torch.device("cuda:0")
    return stream


def test_host_function_is_launched_on_the_given_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    cuda_stream(monkeypatch, runtime).host_function(1234, 5678)
    assert runtime.launched == [(77, 1234, 5678)]


def test_refused_host_function_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cuda_stream(monkeypatch, FakeRuntime(900))
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing \(error 900"):
        stream.host_function(1, 2)


def test_pinned_memory_is_allocated_in_relaxed_capture_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime()
    stream = cuda_stream(monkeypatch, runtime)
    modes = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        assert kwargs["pin_memory"]
        modes.append(runtime.mode)
        raise RuntimeError("no pinned memory left")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(RuntimeError, match="no pinned memory left"):
        stream.pinned((2, 3), torch.int64)
    assert modes == [2] and runtime.mode == 0


class FakeDriver:
    """Remembers stream memory operations; `code` is what they return."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[object, ...]] = []

    def cuMemHostGetDevicePointer_v2(self, box: Any, host: int, flags: int) -> int:  # noqa: N802
        box._obj.value = host + 0x10000
        return 0

    def cuStreamWriteValue64_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("write", *arguments))
        return self.code

    def cuStreamWaitValue64_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("wait", *arguments))
        return self.code

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_NOT_SUPPORTED"
        return 0


def test_flags_go_to_the_device_address(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, stream = FakeDriver(), cuda_stream(monkeypatch, FakeRuntime())
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    cuda.device_address.cache_clear()
    stream.write_value(0x40, 9)
    stream.wait_value(0x48, 1)
    assert driver.calls == [("write", 77, 0x10040, 9, 0), ("wait", 77, 0x10048, 1, 1)]
    driver.code = 801
    with pytest.raises(RuntimeError, match=r"WriteValue64 failed: CUDA_ERROR_NOT_SUPPORTED \(err"):
        stream.write_value(0x40, 9)
    cuda.device_address.cache_clear()
