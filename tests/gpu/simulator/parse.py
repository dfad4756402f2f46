"""PTX text -> the kernel's parameters, shared memory, registers and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    op: tuple[str, ...]
    """`ld.global.v4.b32` as ("ld", "global", "v4", "b32")."""
    args: tuple[str, ...]
    guard: str
    """Predicate register, "" without one."""
    negated: bool

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    """One entry of a PTX module."""

    name: str
    params: dict[str, tuple[int, int]]
    """Name -> offset and size in bytes; ordered."""
    threads: int
    shared: dict[str, int] = field(default_factory=dict)
    """Symbol -> offset in shared memory."""
    registers: dict[str, str] = field(default_factory=dict)
    """Name -> type, "pred" or "b32"; names of inner scopes are made unique with an @."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|shared|const)\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT = re.compile(r"[^;]*;")


def parse(ptx: str) -> Kernel:
    """The only entry of a module's text."""
    ptx = re.sub(r"//[^\n]*|(?m:^\s*\.(?:loc|file)\b[^\n]*)", "", ptx)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.S)
    if head is None:
        raise ValueError("no .entry in this PTX")
    name, params, attributes = head.groups()
    threads = 1
    if block := re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", attributes):
        sizes = [int(n) for n in block[1].split(",")]
        if max(sizes[1:], default=1) > 1:
            raise NotImplementedError(f"blocks of {sizes} threads: only x is simulated")
        threads = sizes[0]
    kernel = Kernel(name, _offsets(params), threads)
    if ".local" in ptx:
        raise NotImplementedError("local memory: an array is indexed at run time, or spilled")
    top = 0
    for align, symbol, size in _SHARED.findall(ptx):
        top = -(-top // int(align)) * int(align)
        kernel.shared[symbol] = top
        top += int(size or 0)
    _statements(kernel, ptx, head.end())
    return kernel


def _offsets(params: str) -> dict[str, tuple[int, int]]:
    places, top = {}, 0
    for align, bits, name, count in _PARAM.findall(params):
        size = int(bits) // 8 * int(count or 1)
        natural = int(align or int(bits) // 8)
        top = -(-top // natural) * natural
        places[name] = (top, size)
        top += size
    return places


def _statements(kernel: Kernel, ptx: str, at: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # a name that is declared there -> its unique name
    line = ptx.count("\n", 0, at) + 1
    while scopes:
        begin = at
        while ptx[at].isspace():
            at += 1
        line += ptx.count("\n", begin, at)
        if ptx[at] == "{":
            scopes.append({})
            at += 1
        elif ptx[at] == "}":
            scopes.pop()
            at += 1
        elif label := _LABEL.match(ptx, at):
            kernel.labels[label[1]] = len(kernel.code)
            at = label.end()
        else:
            statement = _STATEMENT.match(ptx, at)
            assert statement is not None
            text = " ".join(statement[0][:-1].split())
            if text.startswith(".reg"):
                _declare(kernel, scopes, text)
            elif not text.startswith("."):
                kernel.code.append(_instruction(line, text, scopes))
            line += statement[0].count("\n")
            at = statement.end()


def _declare(kernel: Kernel, scopes: list[dict[str, str]], text: str) -> None:
    _, kind, names = text.split(maxsplit=2)
    for name in names.split(","):
        name = name.strip()
        if family := re.fullmatch(r"(.+)<(\d+)>", name):
            declared = [f"{family[1]}{i}" for i in range(int(family[2]))]
        else:
            declared = [name]
        for register in declared:
            unique = register if len(scopes) == 1 else f"{register}@{len(kernel.registers)}"
            scopes[-1][register] = unique
            kernel.registers[unique] = kind.lstrip(".")


def _instruction(line: int, text: str, scopes: list[dict[str, str]]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?(\S+)\s*(.*)", text)
    assert match is not None, text
    negated, guard, op, operands = match.groups()
    inner = {name: unique for scope in scopes[1:] for name, unique in scope.items()}

    def unique(word: str) -> str:
        return re.sub(r"[%\w$.]+", lambda found: inner.get(found[0], found[0]), word)

    args = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)
    return Instruction(
        line,
        text,
        tuple(op.split(".")),
        tuple(unique(arg.strip()) for arg in args),
        unique(guard or ""),
        negated == "!",
    )
