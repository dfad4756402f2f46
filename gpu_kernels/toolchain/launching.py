"""Launches: values of arguments -> the driver's call.

What a launch needs is made once for each kernel and device: the function, a buffer for the
parameters, an array of their addresses, the driver's record of the launch. A launch writes the
values into the buffer and calls the driver, which copies them. With 8 tensors and 4 numbers that
takes 5.4 us of a Zen 4 core beside a driver that does nothing, where the call alone takes 0.6.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import cuda_driver as cuda
from hybrid_moe.gpu_kernels.toolchain.architectures import architecture_of
from hybrid_moe.gpu_kernels.toolchain.binaries import KernelBinary, compiled, warm
from hybrid_moe.gpu_kernels.toolchain.parameters import parameter_format, parameter_places
from hybrid_moe.locks import ProcessLock

Value = torch.Tensor | float | None
"""Of an argument: a tensor or None (a null pointer) for a pointer, a number for a scalar."""

_SHARED_BY_DEFAULT = 48 << 10
"""Bytes of dynamic shared memory that a kernel may have without asking."""
_MOST_X, _MOST_YZ = 2**31 - 1, 65535
"""Blocks along the axes of a grid."""
_MOST_ALIASES = 4096

_loading = ProcessLock()


class LoadedKernel:
    """A kernel on one device."""

    def __init__(
        self,
        driver: cuda.CudaDriver,
        definition: KernelDefinition,
        binary: KernelBinary,
        device: int,
    ) -> None:
        self._driver = driver
        self._what = f"{definition.name} ({definition.config!r}) on GPU {device}"
        self._context = driver.context(device)
        self._lock = ProcessLock()
        with driver.within(self._context):
            self._function = driver.load(binary.cubin, binary.entry, self._what)
            if definition.shared_bytes > _SHARED_BY_DEFAULT:
                code = driver.library.cuFuncSetAttribute(
                    self._function, cuda.MAX_DYNAMIC_SHARED_SIZE_BYTES, definition.shared_bytes
                )
                driver.check(
                    code, f"{definition.shared_bytes} bytes of shared memory, {self._what}"
                )
        self._format = struct.Struct(parameter_format(definition))
        self._buffer = ctypes.create_string_buffer(max(1, self._format.size))
        base = ctypes.addressof(self._buffer)
        places = [base + offset for offset, _ in parameter_places(definition)]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._attribute = cuda.LaunchAttribute(id=cuda.PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = cuda.LaunchConfig(
            block_x=definition.threads,
            block_y=1,
            block_z=1,
            shared_bytes=definition.shared_bytes,
            attributes=ctypes.pointer(self._attribute),
        )
        self._config_place = ctypes.byref(self._config)
        self._current = ctypes.c_void_p()
        self._current_place = ctypes.byref(self._current)
        self._get_current = driver.library.cuCtxGetCurrent
        self._launch = driver.library.cuLaunchKernelEx

    def launch(
        self, parameters: Sequence[float], grid: tuple[int, int, int], stream: int, pdl: bool
    ) -> None:
        """Queue the kernel.

        Args:
            parameters: addresses and scalars, in order.
            stream: `cudaStream_t`; 0 is the default stream.
            pdl: whether it may begin before what was queued before it has ended
                (programmatic dependent launch, sm_90 and later); the kernel waits itself then.
        """
        with self._lock:  # until the driver has copied the parameters
            self._format.pack_into(self._buffer, 0, *parameters)
            config = self._config
            config.grid_x, config.grid_y, config.grid_z = grid
            config.stream = stream
            config.attribute_count = pdl
            self._get_current(self._current_place)
            if self._current.value == self._context:
                code = self._launch(self._config_place, self._function, self._places, None)
            else:
                with self._driver.within(self._context):
                    code = self._launch(self._config_place, self._function, self._places, None)
        if code:
            self._driver.check(code, f"launching {self._what}")


class _Launcher:
    """A kernel on all devices, and what its pointers must be."""

    def __init__(self, definition: KernelDefinition) -> None:
        self.definition = definition
        self.pointers = [
            (number, argument.name, argument.align - 1)
            for number, argument in enumerate(definition.arguments)
            if argument.align
        ]
        self.on: dict[int, LoadedKernel] = {}

    def loaded(self, device: int) -> LoadedKernel:
        found = self.on.get(device)
        if found is None:
            binary = compiled(self.definition, device_architecture(device))
            with _loading:
                found = self.on.get(device)
                if found is None:
                    found = LoadedKernel(cuda.driver(), self.definition, binary, device)
                    self.on[device] = found
        return found


@functools.lru_cache(maxsize=1024)
def _launcher(definition: KernelDefinition) -> _Launcher:
    return _Launcher(definition)


_aliases: dict[int, tuple[KernelDefinition, _Launcher]] = {}
"""Id of a definition -> the definition, so that the id stays its own, and its launcher. Hashing a
definition takes longer than all else in a launch."""


def launch(
    definition: KernelDefinition,
    values: Sequence[Value],
    grid: int | tuple[int, ...],
    stream: int | None = None,
    pdl: bool = False,
) -> None:
    """Queue a kernel on the device of its tensors; compile and load it if that was not done.

    Args:
        values: of the arguments, in order. Tensors on one CUDA device, contiguous and of the right
            dtype, which the caller has checked; None is a null pointer.
        grid: blocks, along up to three axes. Nothing is launched where there are none.
        stream: `cudaStream_t` as int, 0 for the default stream; None for torch's current stream.
        pdl: see `LoadedKernel.launch`.

    Raises:
        ValueError: a tensor on another device or not aligned, a number out of range, or too many
            blocks; with the argument's name.
        RuntimeError: the driver refused, or an earlier kernel has failed; with what to do.
    """
    known = _aliases.get(id(definition))
    if known is None:
        if len(_aliases) >= _MOST_ALIASES:
            _aliases.clear()
        known = _aliases[id(definition)] = definition, _launcher(definition)
    launcher = known[1]
    parameters, device = _parameters(launcher, values)
    blocks = _blocks(grid)
    if 0 in blocks:
        return
    if stream is None:
        stream = current_stream(device)
    try:
        launcher.loaded(device).launch(parameters, blocks, stream, pdl)
    except struct.error as error:
        raise ValueError(f"{definition.name}: {_misfit(definition, values)}") from error


def prepare(definitions: Sequence[KernelDefinition], device: torch.device) -> None:
    """Compile kernels, several at a time, and load them: before a CUDA graph is captured."""
    index = torch.cuda.current_device() if device.index is None else device.index
    warm(definitions, device_architecture(index))
    for definition in definitions:
        _launcher(definition).loaded(index)


def _parameters(launcher: _Launcher, values: Sequence[Value]) -> tuple[list[Any], int]:
    """Addresses and scalars, and the device of all tensors."""
    parameters: list[Any] = list(values)
    name_of_kernel, expected = launcher.definition.name, len(launcher.definition.arguments)
    if len(parameters) != expected:
        raise ValueError(f"{name_of_kernel}: {len(parameters)} values for {expected} arguments")
    device: int | None = None
    for number, name, mask in launcher.pointers:
        tensor = parameters[number]
        if tensor is None:
            parameters[number] = 0
            continue
        its_device = tensor.get_device()
        if its_device != device:
            if its_device < 0 or device is not None:
                right = "a CUDA device" if device is None else f"cuda:{device} as the others"
                raise ValueError(
                    f"{name_of_kernel}: {name} is on {tensor.device}, must be on {right}"
                )
            device = its_device
        address = tensor.data_ptr()
        if address & mask:
            raise ValueError(
                f"{name_of_kernel}: {name} begins at address {address:#x}, must be a multiple of "
                f"{mask + 1} bytes"
            )
        parameters[number] = address
    if device is None:
        raise ValueError(f"{name_of_kernel}: no tensor tells the device")
    return parameters, device


def _blocks(grid: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
    if not (0 <= x <= _MOST_X and 0 <= y <= _MOST_YZ and 0 <= z <= _MOST_YZ):
        raise ValueError(
            f"a grid of {x} x {y} x {z} blocks: at most {_MOST_X} x {_MOST_YZ} x {_MOST_YZ}"
        )
    return x, y, z


def _misfit(definition: KernelDefinition, values: Sequence[Value]) -> str:
    """Which scalar does not fit its type."""
    for argument, value, kind in zip(
        definition.arguments, values, parameter_format(definition)[1:], strict=True
    ):
        try:
            if not argument.align:
                struct.pack(kind, value)
        except struct.error:
            return f"{argument.name} = {value!r} is no {argument.type}"
    return "a value does not fit its argument"


@functools.lru_cache(maxsize=64)
def device_architecture(device: int) -> str:
    """The architecture that GPU `device` runs code of.

    Raises:
        RuntimeError: there are no kernels for it.
    """
    capability = torch.cuda.get_device_capability(device)
    arch = architecture_of(capability)
    if arch is None:
        raise RuntimeError(
            f"GPU {device} has compute capability {capability[0]}.{capability[1]}, for which there "
            "are no kernels"
        )
    return arch


@functools.lru_cache(maxsize=64)
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one in front has ended: sm_90 and later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _raw_stream() -> Callable[[int], int]:
    """torch's own shortcut where it has it: a Stream object takes ten times as long."""
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


current_stream = _raw_stream()
