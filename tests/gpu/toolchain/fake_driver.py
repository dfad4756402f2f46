"""A stand-in for `libcuda.so.1`: it remembers what it was asked, and fails on demand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from hybrid_moe.gpu_kernels.toolchain.cuda_driver import LaunchConfig


class FakeLibrary:
    """Functions are plain attributes, since the code under test sets their signatures.

    Attributes:
        calls: names of all calls, in order.
        launches: of each launch the function, the bytes of the parameters one by one (of `sizes`),
            grid, block, shared memory, stream, and attributes as {id: value}.
        codes: name of a call -> the error that it returns.
        current: the context of "this thread".
        mode: of stream capture, of "this thread".
    """

    def __init__(self, sizes: tuple[int, ...] = ()) -> None:
        self.sizes = sizes
        self.calls: list[str] = []
        self.launches: list[dict[str, Any]] = []
        self.loaded: list[tuple[bytes, int | None, int]] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.codes: dict[str, int] = {}
        self.contexts: list[int | None] = [None]
        self.mode = 0
        for name in dir(type(self)):
            if name.startswith("cu"):
                setattr(self, name, self._counted(name, getattr(self, name)))

    def _counted(self, name: str, call: Callable[..., None]) -> Callable[..., int]:
        def counted(*arguments: Any) -> int:
            self.calls.append(name)
            code = self.codes.get(name, 0)
            if code == 0:
                call(*arguments)
            return code

        return counted

    def cuGetErrorName(self, code: int, name: Any) -> None:  # noqa: N802
        name._obj.value = f"CUDA_ERROR_{code}".encode()

    def cuDriverGetVersion(self, version: Any) -> None:  # noqa: N802
        version._obj.value = 12090

    def cuDevicePrimaryCtxRetain(self, handle: Any, device: int) -> None:  # noqa: N802
        handle._obj.value = 1000 + device

    def cuCtxGetCurrent(self, handle: Any) -> None:  # noqa: N802
        handle._obj.value = self.contexts[-1]

    def cuCtxPushCurrent_v2(self, context: int) -> None:  # noqa: N802
        self.contexts.append(context)

    def cuCtxPopCurrent_v2(self, handle: Any) -> None:  # noqa: N802
        handle._obj.value = self.contexts.pop()

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:  # noqa: N802
        self.mode, mode._obj.value = mode._obj.value, self.mode

    def cuModuleLoadData(self, handle: Any, cubin: bytes) -> None:  # noqa: N802
        self.loaded.append((cubin, self.contexts[-1], self.mode))
        handle._obj.value = len(self.loaded)

    def cuModuleGetFunction(self, handle: Any, module: int, entry: bytes) -> None:  # noqa: N802
        handle._obj.value = 100 * module

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> None:  # noqa: N802
        self.attributes.append((function, attribute, value))

    def cuLaunchKernelEx(  # noqa: N802
        self, config: Any, function: int, parameters: Any, extra: None
    ) -> None:
        asked: LaunchConfig = config._obj
        set_attributes = [asked.attributes[i] for i in range(asked.attribute_count)]
        self.launches.append(
            {
                "function": function,
                "context": self.contexts[-1],
                "parameters": [
                    ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)
                ],
                "grid": (asked.grid_x, asked.grid_y, asked.grid_z),
                "block": (asked.block_x, asked.block_y, asked.block_z),
                "shared": asked.shared_bytes,
                "stream": asked.stream,
                "attributes": {each.id: each.value for each in set_attributes},
            }
        )


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on a GPU, at an address of our choice."""

    address: int

    @staticmethod
    def __new__(cls, address: int, device: int = 0) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, (64,), dtype=torch.float32, device=torch.device("cuda", device)
        )
        tensor.address = address
        return tensor

    def data_ptr(self) -> int:
        return self.address

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing computes with it")
