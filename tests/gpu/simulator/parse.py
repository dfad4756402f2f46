"""PTX text -> the kernel's parameters, shared memory, registers and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v4.b32 {...}, [%rd8];` has op ("ld", "global", "v4", "b32")."""

    line: int
    text: str
    op: tuple[str, ...]
    args: tuple[str, ...]
    guard: str  # "!%p1", "" without one

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    """One entry of a PTX module."""

    threads: int
    params: dict[str, int]  # name -> offset in bytes
    params_bytes: int
    shared: dict[str, int]  # symbol -> offset in shared memory
    shared_bytes: int  # of symbols with a size; dynamic shared memory comes behind
    registers: dict[str, str] = field(default_factory=dict)  # name -> type, "pred" or "b32"
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)??(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\[(\d*)\]")
_TOKEN = re.compile(r"\s+|(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)|(?P<statement>[^;]*);")
_ARGUMENT = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


def parse(ptx: str) -> Kernel:
    """The only entry of a module's text."""
    ptx = re.sub(r"//[^\n]*|(?m:^\s*\.(?:loc|file)\b[^\n]*)", "", ptx)
    head = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)(.*?)\{", ptx, re.S)
    if head is None:
        raise ValueError("no .entry in this PTX")
    if re.search(r"\.local\b", ptx):
        raise NotImplementedError("local memory: an array is indexed at run time, or spilled")
    block = re.search(r"\.reqntid\s+([\d, ]+)", head[2])
    sizes = [int(n) for n in block[1].split(",")] if block else [1]
    if max(sizes[1:], default=1) > 1 or sizes[0] % 32:
        raise NotImplementedError(f"blocks of {sizes} threads: whole warps along x, please")
    shared = [(align, bits, name, n or "0") for align, bits, name, n in _SHARED.findall(ptx)]
    shared.sort(key=lambda symbol: symbol[3] == "0")
    kernel = Kernel(sizes[0], *_offsets(_PARAM.findall(head[1])), *_offsets(shared))
    _statements(kernel, ptx, head.end())
    return kernel


def _offsets(found: list[tuple[str, str, str, str]]) -> tuple[dict[str, int], int]:
    """Places of variables, one after another: (alignment, bits, name, count) each."""
    places, top = {}, 0
    for align, bits, name, count in found:
        natural = int(align or int(bits) // 8)
        places[name] = -(-top // natural) * natural
        top = places[name] + int(bits) // 8 * int(count or 1)
    return places, top


def _statements(kernel: Kernel, ptx: str, at: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # name -> its unique name, of each scope that is open
    line = ptx.count("\n", 0, at) + 1
    while scopes:
        token = _TOKEN.match(ptx, at)
        if token is None:
            raise ValueError(f"line {line}: {ptx[at : at + 40]!r}")
        if token["brace"] == "{":
            scopes.append({})
        elif token["brace"]:
            scopes.pop()
        elif token["label"]:
            kernel.labels[token["label"]] = len(kernel.code)
        elif token["statement"]:
            text = " ".join(token["statement"].split())
            if text.startswith(".reg"):
                _declare(kernel, scopes, text)
            elif not text.startswith("."):
                kernel.code.append(_instruction(line, text, scopes))
        line += token[0].count("\n")
        at = token.end()


def _declare(kernel: Kernel, scopes: list[dict[str, str]], text: str) -> None:
    _, kind, names = text.split(maxsplit=2)
    for name in re.split(r"\s*,\s*", names):
        family = re.fullmatch(r"(.+)<(\d+)>", name)
        declared = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
        for register in declared:
            unique = register if len(scopes) == 1 else f"{register}@{len(kernel.registers)}"
            scopes[-1][register] = unique
            kernel.registers[unique] = kind.lstrip(".")


def _instruction(line: int, text: str, scopes: list[dict[str, str]]) -> Instruction:
    inner = {name: unique for scope in scopes[1:] for name, unique in scope.items()}
    guard, op = "", text
    if inner:
        op = re.sub(r"[%\w$.]+", lambda word: inner.get(word[0], word[0]), text)
    if op[0] == "@":
        guard, op = op[1:].split(maxsplit=1)
    op, _, operands = op.partition(" ")
    args = tuple(arg.strip() for arg in _ARGUMENT.findall(operands))
    return Instruction(line, text, tuple(op.split(".")), args, guard)
