"""Instructions of a compiled kernel, counted from its assembly with the turns of its loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

_LABEL = re.compile(r"^(\.?\w+):")
_INSTRUCTION = re.compile(r"^\t([a-z]\w*)(?:\s+(.*))?$")
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
        is_store = self.mnemonic.startswith(("mov", "vmov")) and self.operands.endswith(")")
        return not is_store

    @property
    def is_vector_work(self) -> bool:
        """Needs a vector pipe; loads, stores and broadcasts from memory do not."""
        moves = self.mnemonic.startswith(("vmov", "vpbroadcast", "vbroadcast"))
        return self.mnemonic.startswith("v") and not (moves and "(" in self.operands)

    def starts(self, *prefixes: str) -> bool:
        return self.is_vector_work and self.mnemonic.startswith(prefixes)


def loop_weights(lines: Sequence[str], trips: Sequence[int]) -> list[int]:
    """How often each line runs, for a function whose loops at depth d turn trips[d] times.

    A loop is what lies between a label and the last jump back to it.
    """
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = re.match(r"^\tj\w+\s+(\.?\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            ends[labels[jump[1]]] = i
    weights = []
    for i in range(len(lines)):
        depth = sum(begin <= i <= end for begin, end in ends.items())
        if depth > len(trips):
            raise ValueError(f"a loop {depth} deep, {len(trips)} were announced")
        weight = 1
        for turns in trips[:depth]:
            weight *= turns
        weights.append(weight)
    return weights


def count(assembly: str, function: str, trips: Sequence[int]) -> Counter[Instruction]:
    """How often each instruction of `function` runs in one call."""
    lines = assembly.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"{function}:"))
    end = next(i for i, line in enumerate(lines) if i > begin and line.startswith(".Lfunc_end"))
    body = lines[begin:end]
    counts: Counter[Instruction] = Counter()
    for line, weight in zip(body, loop_weights(body, trips), strict=True):
        found = _INSTRUCTION.match(line.split("#", 1)[0].rstrip())
        if found:
            counts[Instruction(found[1], found[2] or "")] += weight
    return counts


@dataclass(frozen=True)
class Limit:
    """What of a processor's core serves some instructions, and how many in a cycle."""

    per_cycle: int
    serves: Callable[[Instruction], bool]


ZEN3: Mapping[str, Limit] = MappingProxyType(
    {
        "dispatch": Limit(6, lambda i: True),
        "vector pipes": Limit(4, lambda i: i.is_vector_work),
        "multiply": Limit(2, lambda i: i.starts("vpmadd", "vpmul", "vmul", "vfmadd", "vpdp")),
        "shuffle, shift": Limit(
            2, lambda i: i.starts("vpshuf", "vshuf", "vperm", "vpmov", "vps", "vextract", "vinsert")
            and not i.starts("vpsub"),
        ),
        "float add, convert": Limit(2, lambda i: i.starts("vadd", "vsub", "vcvt")),
        "load": Limit(2, lambda i: i.is_load),
    }
)  # fmt: skip
"""AMD, Software Optimization Guide for the AMD Family 19h Processors, section 2.11."""


def fewest_cycles(
    counts: Counter[Instruction], core: Mapping[str, Limit] = ZEN3
) -> tuple[str, float]:
    """The limit that binds, and the cycles it needs if nothing else ever waits."""
    needed = {
        name: sum(n for i, n in counts.items() if limit.serves(i)) / limit.per_cycle
        for name, limit in core.items()
    }
    return max(needed.items(), key=lambda item: item[1])
