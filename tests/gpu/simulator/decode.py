"""Instruction -> a Python function over all lanes, its operands resolved to registers.

A register is an element of a list: an array with one element a lane, or with a single one where
all lanes hold the same value (parameters, loop counters), which NumPy broadcasts. Immediates and
special registers are registers too, filled before the kernel starts. Arrays are never changed in
place: an instruction binds a new one, so that a `mov` costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.numbers import POISON, TYPES, UNSIGNED, Array
from tests.gpu.simulator.parse import Instruction, Kernel

if TYPE_CHECKING:
    from tests.gpu.simulator.execute import Warps

Mask = Array | None
"""Lanes that take part; None is all."""
Step = Callable[["Warps", Mask], None]
Source = Callable[[list[Array]], Array]

CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
IGNORED = {"membar", "fence", "prefetch", "griddepcontrol", "nanosleep", "discard"}
_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8,16})")
_ADDRESS = re.compile(r"\[\s*([%\w$.@]+)\s*(?:\+?\s*(-?\w+))?\s*\]")


@dataclass(frozen=True)
class Meaning:
    """What an instruction does with the values of its operands.

    Attributes:
        function: of a lane's operation, arrays -> array. `together` has the warps and the mask in
            front, and gives as many arrays as there are destinations.
        kinds: type of each source; the last one stands for all further ones.
        dests: whether the first operand is written.
    """

    function: Callable[..., Any]
    kinds: Sequence[str]
    together: bool = False
    dests: bool = True


def split(arg: str) -> list[str]:
    """The registers of a vector."""
    return [name.strip() for name in arg[1:-1].split(",")] if arg[0] == "{" else [arg]


class Decoder:
    """Assigns the registers of one kernel and decodes its code."""

    def __init__(
        self, kernel: Kernel, meanings: Sequence[Callable[[Instruction], Meaning | None]]
    ) -> None:
        self.initial: list[Array] = []  # register -> value at the start: immediate, or poison
        self.specials: dict[str, int] = {}  # special register that is read -> register
        self._symbols = kernel.shared | kernel.params
        self._immediates: dict[tuple[str, str], int] = {}
        self._registers: dict[str, int] = {}
        for name, kind in kernel.registers.items():
            dtype = TYPES["pred" if kind == "pred" else f"u{TYPES[kind].itemsize * 8}"]
            self._registers[name] = self._new(np.array([POISON], np.uint64).astype(dtype))
        self._meanings = meanings
        self.steps = [self._decode(instruction) for instruction in kernel.code]

    def _new(self, value: Array) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    def _decode(self, instruction: Instruction) -> Step | None:
        """None for what changes the program counter."""
        op, args = instruction.op, instruction.args
        if op[0] in IGNORED or op[:2] == ("bar", "warp"):
            return lambda warps, mask: None
        if op[0] in CONTROL:
            return None
        try:
            for meanings in self._meanings:
                if meaning := meanings(instruction):
                    names = split(args[0]) if meaning.dests else []
                    names = names[0].split("|") if len(names) == 1 else names
                    sources = [name for arg in args[meaning.dests :] for name in split(arg)]
                    step = self._step(meaning, names, sources)
                    return self._guarded(instruction, step) if instruction.guard else step
        except (KeyError, IndexError) as error:
            raise NotImplementedError(str(instruction)) from error
        raise NotImplementedError(str(instruction))

    def _step(self, meaning: Meaning, dests: list[str], args: list[str]) -> Step:
        function, last = meaning.function, len(meaning.kinds) - 1
        sources = [self.source(arg, meaning.kinds[min(i, last)]) for i, arg in enumerate(args)]
        puts = [self._sink(name) for name in dests]
        if meaning.together or len(puts) != 1:

            def step(warps: Warps, mask: Mask) -> None:
                values = [source(warps.R) for source in sources]
                results = function(warps, mask, *values) if meaning.together else function(*values)
                for put, result in zip(puts, results if puts else (), strict=False):
                    put(warps, result, mask)

            return step
        (put,) = puts
        if len(sources) == 1:
            (a,) = sources
            return lambda warps, mask: put(warps, function(a(warps.R)), mask)
        if len(sources) == 2:
            a, b = sources
            return lambda warps, mask: put(warps, function(a(warps.R), b(warps.R)), mask)
        return lambda warps, mask: put(warps, function(*[s(warps.R) for s in sources]), mask)

    def _guarded(self, instruction: Instruction, step: Step) -> Step:
        taken = self.source(instruction.guard, "pred")

        def guarded(warps: Warps, mask: Mask) -> None:
            lanes = taken(warps.R)
            if lanes.size == 1:
                if lanes[0]:
                    step(warps, mask)
                return
            if mask is not None:
                lanes = lanes & mask
            if lanes.any():
                step(warps, None if lanes.all() else lanes)

        return guarded

    # ---- operands

    def source(self, arg: str, kind: str) -> Source:
        """What reads an operand as an array of the type `kind`, an address as int64."""
        dtype = TYPES[kind]
        if arg[0] == "!":
            inner = self.source(arg[1:], kind)
            return lambda R: np.logical_not(inner(R))
        if address := _ADDRESS.fullmatch(arg):
            base, offset = self.source(address[1], kind), int(address[2] or "0", 0)
            return lambda R: base(R).astype(np.int64) + offset
        index = self._registers.get(arg, self.specials.get(arg))
        if index is None and (arg[0] == "%" or arg == "WARP_SZ"):
            index = self.specials[arg] = self._new(np.zeros(1, np.uint32))
        if index is None:
            if (arg, kind) not in self._immediates:
                self._immediates[arg, kind] = self._new(self._immediate(arg, dtype))
            return itemgetter(self._immediates[arg, kind])
        held = self.initial[index].dtype
        if held == dtype:
            return itemgetter(index)
        if held.itemsize == dtype.itemsize:
            return lambda R: R[index].view(dtype)
        return lambda R: R[index].astype(dtype)

    def _immediate(self, arg: str, dtype: Any) -> Array:
        if arg in self._symbols:
            number = self._symbols[arg]
        elif real := _FLOAT.fullmatch(arg):
            number = int(real[1], 16)
        else:
            number = self.constant(arg)
        bits = UNSIGNED[dtype.itemsize]
        value = np.array([number & ((1 << 8 * bits.itemsize) - 1)], np.uint64).astype(bits)
        return value.astype(bool) if dtype.kind == "b" else value.view(dtype)

    @staticmethod
    def constant(arg: str) -> int:
        """The value of an immediate."""
        if not re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", arg):
            raise KeyError(arg)
        return int(arg.rstrip("U"), 0)

    def _sink(self, name: str) -> Callable[[Warps, Array, Mask], None]:
        """What binds a register to a new value, in the lanes of a mask."""
        if name == "_":
            return lambda warps, value, mask: None
        index = self._registers[name]
        dtype = self.initial[index].dtype

        def put(warps: Warps, value: Array, mask: Mask) -> None:
            if value.dtype is not dtype:
                same = value.dtype.itemsize == dtype.itemsize
                value = value.view(dtype) if same else value.astype(dtype)
            R = warps.R
            R[index] = value if mask is None else np.where(mask, value, R[index])

        return put
