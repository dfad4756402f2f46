"""Instruction -> a Python function over all lanes, its operands resolved to registers.

A register is an element of a list: an array with one element a lane, or with a single one where
all lanes hold the same value (parameters, loop counters), which NumPy broadcasts. Immediates and
special registers are registers too, filled before the kernel starts. Arrays are never changed in
place: an instruction binds a new one, so that a `mov` costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator import access, arithmetic, collective
from tests.gpu.simulator.numbers import POISON, TYPES, UNSIGNED, Array
from tests.gpu.simulator.parse import Instruction, Kernel

if TYPE_CHECKING:
    from tests.gpu.simulator.execute import Warps

Mask = Array | None
"""Lanes that take part; None is all."""
Step = Callable[["Warps", Mask], None]
Source = Callable[[list[Array]], Array]

CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
IGNORED = {"membar", "fence", "prefetch", "griddepcontrol", "nanosleep", "discard", "applypriority"}
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8,16})")
_ADDRESS = re.compile(r"\[\s*([%\w$.@]+)\s*(?:\+?\s*(-?\w+))?\s*\]")


def _special(name: str) -> bool:
    return name.startswith("%") or name == "WARP_SZ"


class Decoder:
    """Assigns the registers of one kernel and decodes its code."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.initial: list[Array] = []
        """Register -> its value before the kernel starts: immediates, else poison."""
        self.specials: dict[str, int] = {}
        """Special register that the kernel reads -> register."""
        self.instruction: Instruction
        self._registers: dict[str, int] = {}
        for name, kind in kernel.registers.items():
            dtype = UNSIGNED[TYPES[kind].itemsize] if kind != "pred" else TYPES[kind]
            self._registers[name] = self._new(np.array([POISON], np.uint64).astype(dtype))
        self.steps: list[Step | None] = []
        for self.instruction in kernel.code:
            self.steps.append(self._decode(self.instruction))

    def _new(self, value: Array) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    def _decode(self, instruction: Instruction) -> Step | None:
        op = instruction.op
        if op[0] in CONTROL and op[:2] != ("bar", "warp"):
            return None
        if op[0] in IGNORED or op[:2] == ("bar", "warp"):
            return lambda warps, mask: None
        for room in (arithmetic, access, collective):
            if op[0] in room.DECODERS:
                step: Step = room.DECODERS[op[0]](self, op, instruction.args)
                return self._guarded(step) if instruction.guard else step
        raise NotImplementedError(str(instruction))

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(str(self.instruction))

    def _guarded(self, step: Step) -> Step:
        taken = self.predicate(self.instruction)

        def guarded(warps: Warps, mask: Mask) -> None:
            lanes = taken(warps.R)
            if lanes.size == 1:
                if lanes[0]:
                    step(warps, mask)
                return
            if mask is not None:
                lanes = lanes & mask
            if lanes.all():
                step(warps, None)
            elif lanes.any():
                step(warps, lanes)

        return guarded

    def predicate(self, instruction: Instruction) -> Source:
        return self.source(("!" if instruction.negated else "") + instruction.guard, "pred")

    # ---- operands

    def source(self, arg: str, kind: str) -> Source:
        """What reads an operand as an array of the type `kind`."""
        dtype = TYPES[kind]
        if arg.startswith("!"):
            inner = self.source(arg[1:], kind)
            return lambda R: np.logical_not(inner(R))
        if arg.startswith("{"):
            return self._packed(arg, dtype)
        if arg not in self._registers and not (arg in self.specials or _special(arg)):
            return itemgetter(self._immediate(arg, dtype))
        index = self.register(arg)
        held = self.initial[index].dtype
        if held == dtype:
            return itemgetter(index)
        if held.itemsize == dtype.itemsize:
            return lambda R: R[index].view(dtype)
        return lambda R: R[index].astype(dtype)

    def register(self, name: str) -> int:
        if name in self._registers:
            return self._registers[name]
        if not _special(name):
            raise self.unknown()
        if name not in self.specials:
            self.specials[name] = self._new(np.zeros(1, np.uint32))
        return self.specials[name]

    def constant(self, arg: str) -> int | None:
        """The value of an immediate, None for a register."""
        return int(arg.rstrip("U"), 0) if _INTEGER.fullmatch(arg) else None

    def _immediate(self, arg: str, dtype: Any) -> int:
        bits = UNSIGNED[dtype.itemsize]
        if arg in self.kernel.shared:
            number = self.kernel.shared[arg]
        elif real := _FLOAT.fullmatch(arg):
            number = int(real[1], 16)
        elif _INTEGER.fullmatch(arg):
            number = int(arg.rstrip("U"), 0)
        else:
            raise self.unknown()
        value = np.array([number & ((1 << 8 * bits.itemsize) - 1)], np.uint64).astype(bits)
        return self._new(value.astype(bool) if dtype.kind == "b" else value.view(dtype))

    def _packed(self, arg: str, dtype: Any) -> Source:
        names = self.vector(arg)
        width = 8 * dtype.itemsize // len(names)
        parts = [self.source(name, f"u{width}") for name in names]

        def pack(R: list[Array]) -> Array:
            value = parts[0](R).astype(dtype)
            for i, part in enumerate(parts[1:], 1):
                value = value | part(R).astype(dtype) << dtype.type(i * width)
            return value

        return pack

    def vector(self, arg: str) -> list[str]:
        return [a.strip() for a in arg[1:-1].split(",")] if arg.startswith("{") else [arg]

    def sink(self, arg: str) -> Callable[[Warps, Array, Mask], None]:
        """What binds a register to a new value, in the lanes of a mask."""
        if arg == "_":
            return lambda warps, value, mask: None
        index = self.register(arg)
        dtype = self.initial[index].dtype

        def put(warps: Warps, value: Array, mask: Mask) -> None:
            if value.dtype is not dtype:
                same = value.dtype.itemsize == dtype.itemsize
                value = value.view(dtype) if same else value.astype(dtype)
            R = warps.R
            R[index] = value if mask is None else np.where(mask, value, R[index])

        return put

    def address(self, arg: str) -> tuple[str, int]:
        """`[base+offset]` -> base, offset."""
        match = _ADDRESS.fullmatch(arg)
        if match is None:
            raise self.unknown()
        return match[1], int(match[2] or "0", 0)

    def alu(self, function: Callable[..., Array], dest: str, *sources: Source) -> Step:
        """A step that computes lane by lane."""
        put = self.sink(dest)
        if len(sources) == 1:
            (a,) = sources
            return lambda w, m: put(w, function(a(w.R)), m)
        if len(sources) == 2:
            a, b = sources
            return lambda w, m: put(w, function(a(w.R), b(w.R)), m)
        return lambda w, m: put(w, function(*[source(w.R) for source in sources]), m)
