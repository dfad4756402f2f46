"""A kernel of one configuration: what the compiler, the launch and the tests' simulator need.

Kernels take pointers and scalars only. Their entry points then have the parameters .u64, .u32 and
.f32, in that order of arguments and with natural alignment, so one packing serves the driver and
the simulator, and a launch needs nothing of the DSL that compiled the kernel.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What kernels are compiled for: Ampere, Ada, Hopper, Blackwell."""

SCALARS = {"i32": "i", "u32": "I", "i64": "q", "f32": "f"}
"""Type of a scalar argument -> its `struct` format."""

_POINTEES = {
    "u8": "Uint8",
    "i32": "Int32",
    "u32": "Uint32",
    "i64": "Int64",
    "bf16": "BFloat16",
    "f32": "Float32",
}
"""Type behind a pointer -> its name in CuTe DSL."""


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        name: for messages.
        type: of a scalar a key of `SCALARS`; of a pointer what it leads to.
        align: of a pointer, in bytes; 0 for a scalar.
    """

    name: str
    type: str
    align: int = 0

    def __post_init__(self) -> None:
        known = _POINTEES if self.align else SCALARS
        if self.type not in known:
            raise ValueError(f"argument {self.name}: type {self.type!r}, must be in {list(known)}")


@dataclass(frozen=True)
class KernelDefinition:
    """One kernel, with all choices made that are made when it is compiled.

    Attributes:
        name: the kernel's, "gate_up".
        config: a frozen dataclass; its `repr` tells compiled kernels apart.
        build: config -> the kernel's object of CuTe DSL, called with arguments and a stream. A
            function of a module, so that another process finds it. It imports the DSL.
        arguments: in order.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
    """

    name: str
    config: Any
    build: Callable[[Any], Any]
    arguments: tuple[Argument, ...]
    threads: int
    shared_bytes: int = 0

    def pack(self, values: Sequence[float]) -> bytes:
        """The parameters of a launch: addresses and scalars in the order of arguments."""
        kinds = ["Q" if argument.align else SCALARS[argument.type] for argument in self.arguments]
        return struct.pack("@" + "".join(kinds), *values)  # "@" aligns each to its size


class Launch(NamedTuple):
    """One launch of a kernel: what the toolchain queues, and the tests' simulator runs.

    Attributes:
        definition: of the kernel.
        values: of its arguments, in order: tensors, numbers, None for a null pointer.
        grid: blocks along up to three axes.
    """

    definition: KernelDefinition
    values: tuple[Any, ...]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Artifacts:
    """What compilation gives.

    Attributes:
        entry: name of the entry point.
        ptx: its text. cubin: the code for one architecture.
    """

    entry: str
    ptx: str
    cubin: bytes


def compile_here(definition: KernelDefinition, arch: str) -> Artifacts:
    """Compile in this process, which imports CuTe DSL (0.6 s, 280 MB) and may crash where the tool
    chain does. Needs neither a GPU nor a driver.

    Args:
        arch: of `ARCHITECTURES`.
    """
    # The DSL's own cache of files does not check who wrote them.
    os.environ.setdefault("CUTE_DSL_DISABLE_FILE_CACHING", "1")
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    def example(argument: Argument) -> Any:
        if not argument.align:
            kind = {"i": "Int32", "I": "Uint32", "q": "Int64", "f": "Float32"}
            return getattr(cutlass, kind[SCALARS[argument.type]])(0)
        pointee = getattr(cutlass, _POINTEES[argument.type])
        return make_ptr(pointee, 256, cute.AddressSpace.gmem, assumed_align=argument.align)

    # What is kept goes through files: in a folder of this call's own, since two compilations would
    # read each other's where the DSL gives their kernels the same name.
    with tempfile.TemporaryDirectory(prefix="hybrid_moe-") as folder:
        compiled = cute.compile(
            definition.build(definition.config),
            *map(example, definition.arguments),
            make_fake_stream(),
            options=f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {shlex.quote(folder)}",
        )
        ptx, cubin = compiled.artifacts.PTX, bytes(compiled.artifacts.CUBIN)
    text = ptx if isinstance(ptx, str) else ptx.decode()
    entry = re.search(r"\.entry\s+([\w$]+)", text)
    if entry is None:
        raise RuntimeError(f"{definition.name} for {arch}: the compiled text has no entry point")
    return Artifacts(entry[1], text, cubin)
