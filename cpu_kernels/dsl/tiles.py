"""Tile registers: a block of eight small matrices that dot products work on as a whole.

A tier with a matrix unit (Intel AMX) lowers these ops to its instructions; the generic lowering
keeps the registers in memory, so that every kernel runs on every tier. A register holds up to 16
rows of 64 bytes. Their shapes are fixed for all kernels of a format by a `TileConfig`, which a
thread loads once per job and drops at its end.

    dot_bytes  C int32 [M][N] += A int8 [M][K] x B int8 [K / 4][N][4], exact modulo 2^32
    dot_pairs  C float32 [M][N] += A bf16 [M][K] x B bf16 [K / 2][N][2]; the products of the even
               and of the odd inputs are summed apart from zero, in ascending order, then added to
               each other, then to C: the order of TDPBF16PS (Intel, Instruction Set Extensions
               Programming Reference, chapter 3)

A B register has the layout of a panel: each 32-bit lane of a row is one output row of the weights.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, Val
from hybrid_moe.cpu_kernels.dsl.ops import unpack_pair
from hybrid_moe.formats.numbers import Array

ROWS = 16
ROW_BYTES = 64
REGISTERS = 8
REGISTER_BYTES = ROWS * ROW_BYTES


@dataclass(frozen=True)
class TileShape:
    """Rows of a register, and bytes of a row."""

    rows: int = ROWS
    row_bytes: int = ROW_BYTES


@dataclass(frozen=True)
class TileConfig:
    """The shape of each register."""

    shapes: tuple[TileShape, ...]

    def __post_init__(self) -> None:
        if len(self.shapes) != REGISTERS:
            raise ValueError(f"{REGISTERS} shapes are needed, not {len(self.shapes)}")
        for shape in self.shapes:
            if not (0 < shape.rows <= ROWS and 0 < shape.row_bytes <= ROW_BYTES):
                raise ValueError(f"a register has up to {ROWS} rows of {ROW_BYTES} bytes: {shape}")

    @property
    def palette(self) -> bytes:
        """The 64 bytes that LDTILECFG loads: palette 1, bytes of a row at 16, rows at 48."""
        row_bytes = struct.pack("<8H", *(shape.row_bytes for shape in self.shapes))
        rows = bytes(shape.rows for shape in self.shapes)
        return bytes([1]).ljust(16, b"\0") + row_bytes.ljust(32, b"\0") + rows.ljust(16, b"\0")


class Tiles:
    """The registers of one kernel. Operands named c, a, b and n are register numbers."""

    def __init__(self, emit: Emit, config: TileConfig) -> None:
        self.emit, self.config = emit, config
        self._memory: Val | None = None

    def memory(self, n: int) -> Val:
        """Where the generic lowering keeps register n: 16 rows, 64 bytes apart."""
        if self._memory is None:
            self._memory = self.emit.scratch(REGISTERS * REGISTER_BYTES)
        memory: Val = self._memory
        return memory + REGISTER_BYTES * n

    def zero(self, n: int) -> None:
        self._op("tile_zero", n)

    def load(self, n: int, address: Val, stride: Val) -> None:
        """Register n = its rows from memory, `stride` bytes apart."""
        self._op("tile_load", n, address, stride)

    def store(self, n: int, address: Val, stride: Val) -> None:
        self._op("tile_store", n, address, stride)

    def dot_bytes(self, c: int, a: int, b: int) -> None:
        self._op("tile_dot_bytes", c, a, b)

    def dot_pairs(self, c: int, a: int, b: int) -> None:
        self._op("tile_dot_pairs", c, a, b)

    def _op(self, name: str, *operands: Any) -> None:
        self.emit.tier.lowering(name)(self, *operands)


def configure(config: TileConfig) -> Callable[[Emit], None]:
    """Kernel (): give the thread's tile registers their shapes. Before its first tile op."""

    def body(emit: Emit) -> None:
        emit.tier.lowering("tile_configure")(Tiles(emit, config))

    return body


def release(emit: Emit) -> None:
    """Kernel (): the thread needs its tile registers no more (they cost context switches)."""
    emit.tier.lowering("tile_release")(emit)


# generic lowerings


def _rows(tiles: Tiles, n: int) -> tuple[Val, TileShape]:
    return tiles.emit.i64(tiles.config.shapes[n].rows), tiles.config.shapes[n]


def _zero(tiles: Tiles, n: int) -> None:
    emit = tiles.emit
    with emit.loop(0, emit.i64(ROWS)) as row:
        emit.store(tiles.memory(n) + row * ROW_BYTES, emit.splat(0, I8, ROW_BYTES), align=64)


def _load(tiles: Tiles, n: int, address: Val, stride: Val) -> None:
    emit = tiles.emit
    rows, shape = _rows(tiles, n)
    _zero(tiles, n)
    with emit.loop(0, rows) as row:
        values = emit.load(address + row * stride, I8, shape.row_bytes)
        emit.store(tiles.memory(n) + row * ROW_BYTES, values, align=64)


def _store(tiles: Tiles, n: int, address: Val, stride: Val) -> None:
    emit = tiles.emit
    rows, shape = _rows(tiles, n)
    with emit.loop(0, rows) as row:
        values = emit.load(tiles.memory(n) + row * ROW_BYTES, I8, shape.row_bytes, align=64)
        emit.store(address + row * stride, values)


def _dot_bytes(tiles: Tiles, c: int, a: int, b: int) -> None:
    emit = tiles.emit
    with emit.loop(0, _rows(tiles, c)[0]) as m:
        total = emit.var(emit.load(tiles.memory(c) + m * ROW_BYTES, I32, 16, align=64))
        with emit.loop(0, _rows(tiles, b)[0]) as k:
            w = emit.load(tiles.memory(b) + k * ROW_BYTES, I32, 16, align=64)
            x = emit.load(tiles.memory(a) + m * ROW_BYTES + k * 4, I32, align=4)
            for i in range(4):
                product = (w << (24 - 8 * i)).sar(24) * (x << (24 - 8 * i)).sar(24)
                total.set(total.get() + product)
        emit.store(tiles.memory(c) + m * ROW_BYTES, total.get(), align=64)


def _dot_pairs(tiles: Tiles, c: int, a: int, b: int) -> None:
    emit = tiles.emit
    with emit.loop(0, _rows(tiles, c)[0]) as m:
        even, odd = (emit.var(emit.splat(0.0, F32, 16)) for _ in range(2))
        with emit.loop(0, _rows(tiles, b)[0]) as k:
            w = unpack_pair(emit.load(tiles.memory(b) + k * ROW_BYTES, I32, 16, align=64))
            x = unpack_pair(emit.load(tiles.memory(a) + m * ROW_BYTES + k * 4, I32, align=4))
            for total, weight, value in zip((even, odd), w, x, strict=True):
                total.set(total.get() + weight * value)
        at = tiles.memory(c) + m * ROW_BYTES
        emit.store(at, emit.load(at, F32, 16, align=64) + (even.get() + odd.get()), align=64)


# what the ops mean


def dot_bytes_meaning(c: Array, a: Array, b: Array) -> Array:
    """int64 [M, N], int8 [M, K], int8 [K / 4, N, 4] -> int64 [M, N]."""
    by_input = b.transpose(0, 2, 1).reshape(-1, b.shape[1]).astype(np.int64)
    total: Array = c + a.astype(np.int64) @ by_input
    return total


def dot_pairs_meaning(c: Array, a: Array, b: Array) -> Array:
    """float32 [M, N], float32 [M, K], float32 [K / 2, N, 2] -> float32 [M, N]."""
    halves = [np.zeros(c.shape, np.float32) for _ in range(2)]
    with np.errstate(all="ignore"):
        for k in range(len(b)):
            for i, half in enumerate(halves):
                half += a[:, 2 * k + i, None] * b[k, None, :, i]
        total: Array = c + (halves[0] + halves[1])
    return total


@dataclass(frozen=True)
class TileOp:
    """A tile operation: its generic lowering, and for the dot products its meaning."""

    lower: Callable[..., None]
    meaning: Callable[..., Array] | None = None


TILE_OPS: Mapping[str, TileOp] = MappingProxyType(
    {
        "tile_configure": TileOp(lambda tiles: None),
        "tile_release": TileOp(lambda emit: None),
        "tile_zero": TileOp(_zero),
        "tile_load": TileOp(_load),
        "tile_store": TileOp(_store),
        "tile_dot_bytes": TileOp(_dot_bytes, dot_bytes_meaning),
        "tile_dot_pairs": TileOp(_dot_pairs, dot_pairs_meaning),
    }
)
