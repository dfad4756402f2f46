"""Intel AMX without AMX: the code that LLVM emits, with every AMX instruction replaced by a call.

`amx_tier(base)` is a tier that lowers tile ops as the `amx` tier does and everything else as
`base`, which this processor can run. Its IR is compiled to assembly for `base` plus AMX; in the
assembly each AMX instruction becomes a call of `Emulator`, which saves and restores every register
of the processor, and what comes out is assembled and run. So all that the tests execute was chosen,
scheduled and addressed by LLVM for AMX.

The emulator follows the operation sections of Intel's Instruction Set Extensions Programming
Reference, chapter 3 (TDPBSSD, TDPBF16PS, LDTILECFG ...), and is stricter than a processor where a
kernel should never go: a tile op without a configuration, or a second configuration, is an error.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.dsl.amx import LOWERINGS
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.jit.compile import Target, assembly

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


# What the instructions compute.


_LEAST_NORMAL = np.finfo(np.float32).tiny


def flush(x: Floats) -> Floats:
    """Subnormals become zeros of their sign: DAZ and FTZ."""
    return np.where(np.abs(x) < _LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def _is_normal(x: npt.NDArray[Any]) -> bool:
    """Whether every element is zero or well inside float32's normal numbers."""
    size = np.abs(x)
    return bool(np.all((size == 0) | ((size >= _LEAST_NORMAL) & (size < 2.0**127))))


def add_rounded_once(total: Floats, product: npt.NDArray[np.float64]) -> Floats:
    """total + product for an exact product of bf16, as a fused multiply-add rounds it: float64's
    sum, rounded to odd, rounds to float32 as if it were exact. Results that are tiny after that
    rounding, to 24 bits whatever the exponent, are zero (seen of VDPBF16PS on a Zen 4)."""
    wide = product + total
    part = wide - total
    lost = (product - part) + (total - (wide - part))  # two-sum: what rounding to float64 lost
    bits = wide.view(np.int64)
    inexact = np.isfinite(wide) & (lost != 0) & (bits & 1 == 0)
    outward = (lost > 0) == (wide > 0)
    odd = np.where(inexact, np.where(outward, bits + 1, bits - 1), bits)
    exact = odd.view(np.float64)
    rounded = exact.astype(np.float32)
    tiny = np.abs((exact * 2.0**64).astype(np.float32)) < 2.0 ** (64 - 126)
    return np.where(tiny, np.copysign(np.float32(0), rounded), rounded).astype(np.float32)


def tdpbf16ps(c: Floats, a: Floats, b: Floats) -> Floats:
    """c [M, N], a [M, K], b [K / 2, N, 2]; DAZ, FTZ, round to nearest even, MXCSR not consulted."""
    pairs = flush(a).reshape(len(a), -1, 2).astype(np.float64)
    products = pairs[:, :, None, :] * flush(b).astype(np.float64)  # exact, [M, K / 2, N, 2]
    if _is_normal(products):
        # then float32 holds the products too, and its own sums round as a fused one does
        sums = np.add.accumulate(products.astype(np.float32) + np.float32(0), axis=1)
        if _is_normal(sums):
            return flush(flush(c) + flush(sums[:, -1, :, 0] + sums[:, -1, :, 1]))
    halves = np.zeros((*c.shape, 2), np.float32)
    for k in range(len(b)):
        halves = add_rounded_once(halves, products[:, k])
    return flush(flush(c) + flush(halves[..., 0] + halves[..., 1]))


def tdpbssd(
    c: npt.NDArray[np.int32], a: npt.NDArray[np.int8], b: npt.NDArray[np.int8]
) -> npt.NDArray[np.int32]:
    """c [M, N], a [M, K], b [K / 4, N, 4]; sums modulo 2^32."""
    by_input = b.transpose(0, 2, 1).reshape(-1, b.shape[1]).astype(np.int64)
    return (c + a.astype(np.int64) @ by_input).astype(np.int32)


# The state of a thread.


@dataclass
class Registers:
    """Eight tiles of 16 rows of 64 bytes, and their shapes once they are configured."""

    tiles: Bytes = field(default_factory=lambda: np.zeros((8, 16, 64), np.uint8))
    row_bytes: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    def view(self, n: int, dtype: Any) -> npt.NDArray[Any]:
        """Tile n as [rows, elements of a row]."""
        return self.tiles[n].view(dtype)[
            : self.rows[n], : self.row_bytes[n] // np.dtype(dtype).itemsize
        ]


def _memory(address: int, rows: int, row_bytes: int, stride: int) -> Bytes:
    """[rows, row_bytes] of memory."""
    buffer = (ctypes.c_uint8 * ((rows - 1) * stride + row_bytes)).from_address(address)
    flat = np.frombuffer(buffer, np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (rows, row_bytes), (stride, 1), writeable=True)


def _bf16(tile: npt.NDArray[Any]) -> Floats:
    return (tile.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Emulator:
    """Tile state per thread, and what has been executed.

    Attributes:
        executed: instruction -> how often.
        errors: what a processor would have raised; a callback cannot.
        loads: if a list, it is told every TILELOADD: (register, address, stride).
    """

    def __init__(self) -> None:
        self.executed: Counter[str] = Counter()
        self.errors: list[str] = []
        self.loads: list[tuple[int, int, int]] | None = None
        self._registers: dict[int, Registers] = {}
        self._lock = threading.Lock()
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
        self._callback = kind(self._execute)
        self.address = ctypes.cast(self._callback, ctypes.c_void_p).value

    @property
    def configured(self) -> int:
        """Threads that hold a configuration now."""
        return len(self._registers)

    def _execute(self, opcode: int, address: int, stride: int, tiles: int) -> None:
        name = MNEMONICS[opcode]
        operands = [tiles >> 8 * i & 7 for i in range(3)]
        with self._lock:
            self.executed[name] += 1
            try:
                getattr(self, "_" + name)(*operands, address=address, stride=stride)
            except Exception as error:
                self.errors.append(f"{name} {operands}: {error!r}")

    def _state(self) -> Registers:
        return self._registers[threading.get_ident()]

    def _ldtilecfg(self, *_: int, address: int, stride: int) -> None:
        if threading.get_ident() in self._registers:
            raise RuntimeError("configured twice")
        palette = ctypes.string_at(address, 64)
        if palette[0] != 1 or any(palette[1:16]) or any(palette[32:48]) or any(palette[56:]):
            raise ValueError(f"reserved bytes of the palette: {palette!r}")
        row_bytes, rows = struct.unpack("<8H", palette[16:32]), tuple(palette[48:56])
        if max(row_bytes) > 64 or max(rows) > 16:
            raise ValueError(f"shapes: {rows} rows of {row_bytes} bytes")
        self._registers[threading.get_ident()] = Registers(row_bytes=row_bytes, rows=rows)

    def _tilerelease(self, *_: int, address: int, stride: int) -> None:
        del self._registers[threading.get_ident()]

    def _tilezero(self, n: int, *_: int, address: int, stride: int) -> None:
        self._state().tiles[n] = 0

    def _tileloadd(self, n: int, *_: int, address: int, stride: int) -> None:
        if self.loads is not None:
            self.loads.append((n, address, stride))
        state = self._state()
        rows, row_bytes = state.rows[n], state.row_bytes[n]
        state.tiles[n] = 0
        state.tiles[n, :rows, :row_bytes] = _memory(address, rows, row_bytes, stride)

    def _tilestored(self, n: int, *_: int, address: int, stride: int) -> None:
        state = self._state()
        rows, row_bytes = state.rows[n], state.row_bytes[n]
        _memory(address, rows, row_bytes, stride)[:] = state.tiles[n, :rows, :row_bytes]

    def _check_shapes(self, c: int, a: int, b: int) -> Registers:
        state = self._state()
        fits = (
            state.rows[c] == state.rows[a]
            and state.row_bytes[c] == state.row_bytes[b]
            and state.row_bytes[a] == 4 * state.rows[b]
            and len({c, a, b}) == 3
        )
        if not fits:
            raise ValueError(f"tiles {c}, {a}, {b} of {state.rows} rows, {state.row_bytes} bytes")
        return state

    def _tdpbssd(self, c: int, a: int, b: int, *, address: int, stride: int) -> None:
        state = self._check_shapes(c, a, b)
        weights = state.view(b, np.int8)
        total = state.view(c, np.int32)
        total[:] = tdpbssd(total, state.view(a, np.int8), weights.reshape(len(weights), -1, 4))

    def _tdpbf16ps(self, c: int, a: int, b: int, *, address: int, stride: int) -> None:
        state = self._check_shapes(c, a, b)
        weights = _bf16(state.view(b, np.uint16))
        total = state.view(c, np.float32)
        with np.errstate(all="ignore"):
            result = tdpbf16ps(
                total, _bf16(state.view(a, np.uint16)), weights.reshape(len(weights), -1, 2)
            )
        total[:] = result


@functools.lru_cache(maxsize=1)
def emulator() -> Emulator:
    """The one emulator of this process, which compiled code finds by the name `SYMBOL`."""
    return Emulator()


SYMBOL = "hybrid_moe_amx_emulator"
MNEMONICS = (
    "ldtilecfg",
    "tilerelease",
    "tilezero",
    "tileloadd",
    "tilestored",
    "tdpbssd",
    "tdpbf16ps",
)


# From an instruction to a call.

_GENERAL = ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
_RED_ZONE = 128
_SAVED = _RED_ZONE + 8 * (1 + len(_GENERAL))  # with the flags
_INSTRUCTION = re.compile(rf"^\s+({'|'.join(MNEMONICS)})\b(.*)$")
_AMX_LIKE = re.compile(r"^\s+(tile|ldtile|sttile|tdp|tcm)")
_MEMORY = re.compile(
    r"(?P<offset>[^(,\s]*)\((?P<base>%\w+)(?:,(?P<index>%\w+)(?:,(?P<scale>\d))?)?\)"
)


def _vectors(host_bits: int) -> tuple[list[str], list[str], int]:
    """Instructions that save and restore the vector registers, and the bytes they take."""
    name, count = ("zmm", 32) if host_bits == 512 else ("ymm", 16)
    nbytes = host_bits // 8
    save = [f"vmovups %{name}{i}, {nbytes * i}(%rsp)" for i in range(count)]
    restore = [f"vmovups {nbytes * i}(%rsp), %{name}{i}" for i in range(count)]
    size = nbytes * count
    if host_bits == 512:
        save += [f"kmovq %k{i}, {size + 8 * i}(%rsp)" for i in range(8)]
        restore += [f"kmovq {size + 8 * i}(%rsp), %k{i}" for i in range(8)]
        size += 64
    return save, restore, size


def _call(mnemonic: str, operands: str, host_bits: int) -> list[str]:
    """Code that calls the emulator and changes nothing else."""
    tiles = [int(n) for n in re.findall(r"%tmm(\d)", operands)]
    tiles.reverse()  # AT&T syntax names the destination last
    memory = _MEMORY.search(operands)
    lines = [f"leaq -{_RED_ZONE}(%rsp), %rsp", "pushfq", *(f"pushq %{r}" for r in _GENERAL)]
    if memory is None:
        if "(" in operands:
            raise NotImplementedError(f"address of {mnemonic} {operands}")
        lines += ["xorl %esi, %esi", "xorl %edx, %edx"]
    else:
        base, index, scale = memory["base"], memory["index"], int(memory["scale"] or 1)
        moved = _SAVED + 8 if base == "%rsp" else 0  # what has been pushed since
        offset = f"{memory['offset'] or 0}+{moved}"
        has_stride = index is not None and mnemonic != "ldtilecfg"
        lines.append(f"pushq {index if has_stride else '$0'}")
        full = f"({base},{index},{scale})" if index and not has_stride else f"({base})"
        lines += [f"leaq {offset}{full}, %rsi", "popq %rdx", f"imulq ${scale}, %rdx, %rdx"]
    save, restore, size = _vectors(host_bits)
    packed = sum(n << 8 * i for i, n in enumerate(tiles))
    lines += [
        f"movl ${MNEMONICS.index(mnemonic)}, %edi",
        f"movl ${packed}, %ecx",
        "movq %rsp, %rbx",
        f"subq ${size}, %rsp",
        "andq $-64, %rsp",
        *save,
        "cld",
        f"movabsq ${SYMBOL}, %rax",
        "callq *%rax",
        *restore,
        "movq %rbx, %rsp",
        *(f"popq %{r}" for r in reversed(_GENERAL)),
        "popfq",
        f"leaq {_RED_ZONE}(%rsp), %rsp",
    ]
    return ["\t" + line for line in lines]


def replace_instructions(text: str, host_bits: int) -> str:
    """Assembly in which every AMX instruction is a call of the emulator."""
    lines: list[str] = []
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found:
            lines += _call(found[1], found[2], host_bits)
        elif _AMX_LIKE.match(line):
            raise NotImplementedError(f"no emulation of {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _as_module(text: str) -> str:
    """IR of a module whose functions are this assembly."""
    escaped = "".join(
        c if 32 <= ord(c) < 127 and c not in '"\\' else f"\\{ord(c):02X}" for c in text
    )
    return f'module asm "{escaped}"\n'


def amx_target(cpu: str, features: str) -> Target:
    """`cpu` with AMX's instructions added."""
    added = ",".join(f"+{name}" for name in sorted(TIERS["amx"].features))
    return Target(cpu, ",".join(filter(None, (features, added))))


def amx_tier(base: Tier) -> Tier:
    """`base` with a matrix unit that `emulator()` executes."""
    llvm.initialize_native_asmparser()
    llvm.add_symbol(SYMBOL, emulator().address)

    def rewrite(text: str) -> str:
        if base.rewrite is not None:
            text = base.rewrite(text)
        code = assembly(text, amx_target(base.target.cpu, base.target.features))
        return _as_module(replace_instructions(code, base.vector_bits))

    return Tier(
        f"amx_emulated_on_{base.name}",
        frozenset(),
        base.cpu,
        vector_bits=base.vector_bits,
        registers=base.registers,
        lowerings=LOWERINGS,
        flushing=TIERS["amx"].flushing,
        extends=base,
        tiles=True,
        rewrite=rewrite,
    )
