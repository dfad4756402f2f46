"""Instructions of a compiled kernel, counted from its assembly with the turns of its loops."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

_LABEL = re.compile(r"^(\.?[\w$]+):")
_INSTRUCTION = re.compile(r"^\t(?:\{e?vex\}\s+)?([a-z]\w*)(?:\s+(.*))?$")
_MASK = re.compile(r"\s*\{[^}]*\}")
_ENDS = ("jmp", "ret", "ud2")
"""How a block ends that nothing falls out of."""
_MEMORY = re.compile(r"\S*\([^)]*\)")


@dataclass(frozen=True)
class Instruction:
    """One line of assembly: mnemonic and operands (AT&T: the destination is last)."""

    mnemonic: str
    operands: str

    @property
    def is_load(self) -> bool:
        """Reads memory (a prefetch does; LEA does not)."""
        found = _MEMORY.search(self.operands)
        if found is None or self.mnemonic.startswith("lea"):
            return False
        destination = _MASK.sub("", self.operands)
        return not (self.mnemonic.startswith(("mov", "vmov")) and destination.endswith(")"))

    @property
    def is_vector_work(self) -> bool:
        """Needs a vector pipe; loads, stores and broadcasts from memory do not."""
        moves = self.mnemonic.startswith(("vmov", "vpbroadcast", "vbroadcast"))
        return self.mnemonic.startswith("v") and not (moves and "(" in self.operands)

    @property
    def halves(self) -> int:
        """Vectors of 32 bytes that it works on."""
        return 2 if "%zmm" in self.operands else 1

    @property
    def loaded_halves(self) -> int:
        """Loads of up to 32 bytes that it takes; a broadcast one is small."""
        small = "{1to" in self.operands or "broadcast" in self.mnemonic
        return 0 if not self.is_load else 1 if small else self.halves

    def starts(self, *prefixes: str) -> bool:
        return self.is_vector_work and self.mnemonic.startswith(prefixes)


@dataclass
class _Block:
    """Instructions between labels and jumps; `after` are the blocks that may run next."""

    instructions: list[Instruction]
    after: set[int]


def _blocks(lines: Sequence[str]) -> list[_Block]:
    """Basic blocks of a function that can run, the first one its entry.

    Raises:
        ValueError: a jump whose aim is in a register.
    """
    parts: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            parts.append([])
            at[label[1]] = len(parts) - 1
        elif found := _INSTRUCTION.match(line.split("#", 1)[0].rstrip()):
            parts[-1].append(Instruction(found[1], found[2] or ""))
            if found[1].startswith(("j", *_ENDS)):
                parts.append([])
    blocks = []
    for i, part in enumerate(parts):
        last = part[-1] if part else Instruction("", "")
        after: set[int] = set()
        if last.mnemonic.startswith("j"):
            if last.operands.startswith("*"):
                raise ValueError(f"where does {last.mnemonic} {last.operands} jump?")
            after = {at[last.operands]} if last.operands in at else set()  # else another function
        if not last.mnemonic.startswith(_ENDS) and i + 1 < len(parts):
            after.add(i + 1)
        blocks.append(_Block(part, after))
    # Blocks that nothing leads to would be entries of the loops beside them: behind every
    # unconditional jump begins one, often an empty one.
    can_run = sorted({0} | _reached(blocks, 0, set(range(len(blocks)))))
    number = {old: new for new, old in enumerate(can_run)}
    return [_Block(blocks[i].instructions, {number[j] for j in blocks[i].after}) for i in can_run]


def _reached(blocks: Sequence[_Block], start: int, among: set[int]) -> set[int]:
    """Blocks of `among` that may run some time after `start`."""
    found: set[int] = set()
    edge = [start]
    while edge:
        new = (blocks[edge.pop()].after & among) - found
        found |= new
        edge += new
    return found


def _loop_depths(blocks: Sequence[_Block], among: set[int]) -> dict[int, int]:
    """How many loops each block is in. A loop is blocks that reach each other; those inside it are
    what is left of it without the block where it is entered.

    Raises:
        ValueError: a loop has two ends: two loops that begin together, or one that is continued
            early. Which of them turns how often cannot be told.
    """
    reached = {i: _reached(blocks, i, among) for i in among}
    depths = dict.fromkeys(among, 0)
    seen: set[int] = set()
    for i in sorted(among):
        loop = {j for j in reached[i] if i in reached[j]}
        if i in seen or not loop:
            continue
        seen |= loop
        outside = set(range(len(blocks))) - loop
        entries = {e for o in outside for e in blocks[o].after & loop} or {0}
        for entry in entries:
            ends = [j for j in loop if entry in blocks[j].after]
            if len(ends) > 1:
                raise ValueError(f"the loop of block {entry} ends in blocks {ends}")
        for j, depth in _loop_depths(blocks, loop - entries).items():
            depths[j] = depth + 1
        for j in entries:
            depths[j] = 1
    return depths


def count(assembly: str, function: str, trips: Sequence[int]) -> Counter[Instruction]:
    """How often each instruction of `function` runs in one call.

    Args:
        trips: turns of a loop that is 1, 2, ... deep; loops at one depth turn equally often.

    Raises:
        ValueError: the function has loops that are deeper, loops whose ends cannot be told apart,
            or jumps to addresses in registers.
    """
    lines = assembly.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"{function}:"))
    end = next(i for i, line in enumerate(lines) if i > begin and line.startswith(".Lfunc_end"))
    blocks = _blocks(lines[begin:end])
    counts: Counter[Instruction] = Counter()
    for i, depth in _loop_depths(blocks, set(range(len(blocks)))).items():
        if depth > len(trips):
            raise ValueError(f"a loop {depth} deep; trips has {len(trips)}")
        for instruction in blocks[i].instructions:
            counts[instruction] += math.prod(trips[:depth])
    return counts


@dataclass(frozen=True)
class Limit:
    """What of a processor's core serves some instructions.

    Attributes:
        per_cycle: vectors of 32 bytes in a cycle.
        needs: how many of them an instruction takes.
    """

    per_cycle: int
    needs: Callable[[Instruction], int]


def _pipes(*prefixes: str) -> Limit:
    """Two of the four vector pipes; they alone take these instructions."""
    return Limit(2, lambda i: i.halves * i.starts(*prefixes))


_ALL = {
    "vector pipes": Limit(4, lambda i: i.halves * i.is_vector_work),
    "load": Limit(2, lambda i: i.loaded_halves),
    "multiply": _pipes("vpmadd", "vpmul", "vmul", "vfmadd", "vpdp", "vdpbf16"),
}
_SHUFFLES = ("vpshuf", "vshuf", "vperm", "vpmov", "vextract", "vinsert", "vpunpck")
_SHIFTS = ("vpsll", "vpsrl", "vpsra")
_ADDS = ("vaddps", "vsubps", "vcvt", "vscalef")

ZEN3: Mapping[str, Limit] = MappingProxyType(
    {
        **_ALL,
        "shuffle, shift": _pipes(*_SHUFFLES, *_SHIFTS),
        "float add, convert": _pipes(*_ADDS),
    }
)
"""AMD, Software Optimization Guide for the AMD Family 19h Processors, section 2.11."""

ZEN4: Mapping[str, Limit] = MappingProxyType(
    {
        **_ALL,
        "shuffle": _pipes(*_SHUFFLES),
        "shift, float add, convert": _pipes(*_SHIFTS, *_ADDS),
    }
)
"""Measured, with mixes of two instructions. A vector of 64 bytes takes a pipe for two cycles."""

_DISPATCH = 6  # instructions of any kind in a cycle, on both


def fewest_cycles(
    counts: Counter[Instruction], core: Mapping[str, Limit] = ZEN3
) -> tuple[str, float]:
    """The limit that binds, and the cycles it needs if nothing else ever waits."""
    needed = {
        name: sum(n * limit.needs(i) for i, n in counts.items()) / limit.per_cycle
        for name, limit in core.items()
    }
    needed["dispatch"] = sum(counts.values()) / _DISPATCH
    return max(needed.items(), key=lambda item: item[1])
