"""A kernel's definition and arrays -> a launch in the simulator.

    report = simulate(definition, "sm_80", grid, {"x": x, "n": 5, "y": y})      # y is written

A test on all architectures pays once for each text that differs:

    for arch in distinct_architectures(definition):
        simulate(definition, arch, ...)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybrid_moe.gpu_kernels.definition import ARCHITECTURES, Argument, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain.binaries import compiled_here as compiled
from tests.gpu import on_device
from tests.gpu.simulator import Access, GlobalMemory, Lint, Traffic, launch

__all__ = ["Report", "compiled", "distinct_architectures", "simulate"]

ITEM_SIZES = {"u8": 1, "bf16": 2, "i32": 4, "u32": 4, "f32": 4, "i64": 8}


@dataclass(frozen=True)
class Report:
    """What a launch cost; empty without lint."""

    accesses: tuple[Access, ...] = ()
    """Of each memory instruction that ran, in the order of the text."""
    reads: Mapping[str, Traffic] = field(default_factory=dict)
    """Pointer -> what was read from its array."""

    def bank_conflicts(self) -> list[Access]:
        """Instructions that needed more wavefronts in shared memory than their words fill."""
        return [a for a in self.accesses if a.space == "shared" and a.units > a.ideal]

    def of(self, array: str, op: str = "ld") -> list[Access]:
        """Instructions ("ld", "st", "cp", ...) on an argument's array; "" is shared memory."""
        return [a for a in self.accesses if a.array == array and a.instruction.op[0] == op]

    def __str__(self) -> str:
        return "\n".join(map(str, self.accesses))


def distinct_architectures(
    definition: KernelDefinition, architectures: Sequence[str] = ARCHITECTURES
) -> tuple[str, ...]:
    """The first architecture of each PTX that differs in more than names of its target; on a GPU,
    its own."""
    if on_device.ON_DEVICE:
        return (on_device.architecture(),)
    texts: dict[str, str] = {}
    for arch in architectures:
        text = re.sub(r"//.*|\.(?:version|target) .*", "", compiled(definition, arch).ptx)
        texts.setdefault(text, arch)
    return tuple(texts.values())


def simulate(
    definition: KernelDefinition,
    arch: str,
    grid: Sequence[int],
    values: Mapping[str, Any] | Sequence[Any],
    seed: int | None = None,
    lint: bool | None = None,
) -> Report:
    """Compile a kernel and run it in the simulator.

    Args:
        grid: blocks, up to three axes.
        values: of all arguments, by name or in order. For a pointer a contiguous NumPy array or
            torch tensor on the CPU, which is used in place, or None for a null pointer; else a
            number.
        seed: random schedules of blocks and warps; None runs all in lockstep.
        lint: count memory requests; by default where there is no seed.
    """
    names = [argument.name for argument in definition.arguments]
    if not isinstance(values, Mapping):
        values = dict(zip(names, values, strict=True))
    if values.keys() != set(names):
        raise ValueError(f"values of {sorted(values)}; the kernel takes {names}")
    if on_device.ON_DEVICE:
        return on_device.run(definition, grid, values)  # type: ignore[return-value]
    memory = GlobalMemory()
    packed = []
    for argument in definition.arguments:
        value = values[argument.name]
        if argument.align:
            packed.append(
                0 if value is None else memory.add(argument.name, _array(argument, value))
            )
        else:
            packed.append(value)
    counter = Lint() if lint or (lint is None and seed is None) else None
    x, y, z = (*grid, 1, 1, 1)[:3]
    launch(
        compiled(definition, arch).ptx,
        (x, y, z),
        definition.pack(packed),
        memory,
        definition.shared_bytes,
        seed,
        counter,
    )
    if counter is None:
        return Report()
    accesses = sorted(counter.accesses.values(), key=lambda access: access.instruction.line)
    unread = {
        argument.name: Traffic(0, 0, 0) for argument in definition.arguments if argument.align
    }
    return Report(tuple(accesses), unread | counter.reads())


def _array(argument: Argument, value: Any) -> np.ndarray[Any, Any]:
    """The bytes of an array or tensor, shared with it."""
    if value.dtype.itemsize != ITEM_SIZES[argument.type]:
        raise TypeError(f"{argument.name} is {value.dtype}; the kernel takes {argument.type}")
    if isinstance(value, np.ndarray):
        return value
    import torch

    assert value.device.type == "cpu" and value.is_contiguous(), argument.name
    view: np.ndarray[Any, Any] = value.detach().view(-1).view(torch.uint8).numpy()
    return view
