"""The kernels of a matrix unit alone: what they read in which order, and what they must not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.dsl.tiles import configure, release
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.kernels.bf16_dot import BF16_STRIP
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.encode import BLOCK_SLACK, FIXED15_GROUP, encode_rows
from hybrid_moe.cpu_kernels.kernels.format_kernels import FormatKernels, format_kernels
from hybrid_moe.cpu_kernels.kernels.integer_dot import unpacked_layout
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import (
    MOST_BLOCK_TOKENS,
    PANELS,
    STRIP_ROWS,
    SUMS_BYTES,
    strip_layout,
)
from hybrid_moe.formats.table import BF16, DENSE_FORMATS, FORMATS
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.amx import emulator
from tests.cpu_kernels.cases import (
    Array,
    Case,
    decode,
    from_bf16,
    integer_matrix,
    random_batch,
    to_bf16,
)
from tests.cpu_kernels.emulation import QUICK, RUNNABLE
from tests.cpu_kernels.toolbox import aligned, before_a_guard, compile_kernel
from tests.formats import random_matrix

GROUPS = 35  # more than one chunk
K = 32 * GROUPS

Emulated = pytest.mark.skipif(
    RUNNABLE["amx"] is TIERS["amx"], reason="this processor has AMX: nothing is emulated"
)
Lowered = pytest.mark.parametrize("lowered", ["generic", "emulated"])
Blocks = pytest.mark.parametrize(
    ("fmt", "most"),
    [(fmt, most) for fmt in DENSE_FORMATS.values() for most in format_kernels(fmt).tile.dots],
    ids=lambda value: value.name if isinstance(value, WeightFormat) else str(value),
)


@dataclass(frozen=True)
class Block:
    """The kernel for 1 to `most` tokens, and what it needs around it."""

    kernels: FormatKernels
    most: int
    dot: Callable[..., None]
    encode: Callable[..., None]
    unpack: Callable[..., None] | None
    enter: Callable[..., None]
    leave: Callable[..., None]

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.enter()
        yield
        self.leave()

    def tile(self, x: Array) -> Array:
        """bf16 bits [T, K] -> bytes of the tile [group][token]."""
        group_bytes = self.kernels.encoding.group_bytes
        rows = aligned((len(x), GROUPS, group_bytes), np.uint8)
        row_bytes = GROUPS * group_bytes
        self.encode(np.ascontiguousarray(x), 2 * K, rows, row_bytes, len(x), GROUPS, group_bytes)
        return rows.transpose(1, 0, 2).reshape(-1)

    def weights(self, fmt: WeightFormat, matrix: Matrix) -> Array:
        """What the kernel reads of a strip, in front of a page that it must not touch."""
        layout = strip_layout(fmt, K)
        strip = before_a_guard(layout.nbytes)
        pack_rows(strip.ctypes.data, range(1), layout, matrix, STRIP_ROWS)
        if self.unpack is None:
            return strip
        unpacked = before_a_guard(GROUPS * self.kernels.unpacked_group_bytes)
        self.unpack(strip, unpacked, 0, GROUPS)
        return unpacked

    def run(
        self, weights: Array, tile: Array, count: int, sums: Array, cuts: Sequence[int]
    ) -> None:
        """Chunk by chunk; `ahead`, a hint, is an address that must not be touched."""
        group_bytes = len(weights) // GROUPS
        ahead = weights.ctypes.data + len(weights)
        with self.entered():
            for begin, end in itertools.pairwise(cuts):
                codes = weights.ctypes.data  # of a strip; unpacked groups begin with the call's
                codes += 0 if self.unpack is None else begin * group_bytes
                self.dot(codes, ahead, tile, count, sums, begin, end)


@functools.cache
def _block(fmt_name: str, most: int, lowered: str) -> Block:
    kernels = format_kernels(DENSE_FORMATS[fmt_name])
    tier = (RUNNABLE if lowered == "emulated" else QUICK)["amx"]
    unpack = kernels.tile.unpack
    return Block(
        kernels,
        most,
        dot=compile_kernel(kernels.tile.dots[most], DOT_ARITY, tier),
        encode=compile_kernel(encode_rows(kernels.encoding), 7, tier),
        unpack=None if unpack is None else compile_kernel(unpack, 4, tier),
        enter=compile_kernel(configure(kernels.tile.config), 0, tier),
        leave=compile_kernel(release, 0, tier),
    )


def _integers(fmt: WeightFormat, rng: np.random.Generator, tokens: int) -> tuple[Matrix, Array]:
    """Weights and activations whose sums float32 holds exactly."""
    x = to_bf16(rng.integers(-60, 61, (tokens, K)))
    return integer_matrix(fmt, rng, STRIP_ROWS, K), x


def _sums(most: int) -> Array:
    """Room for a block, of NaN, in front of a page that must not be touched."""
    return before_a_guard(most * SUMS_BYTES, 0xFF).view(np.float32).reshape(most, STRIP_ROWS)


@Lowered
@Blocks
@pytest.mark.parametrize("poison", [0x00, 0x7F80, 0xFFFF], ids=["zero", "infinite", "nan"])
def test_what_lies_behind_a_tile(fmt: WeightFormat, most: int, poison: int, lowered: str) -> None:
    """It may be anything, as may sums beyond the tokens; and it is no more than announced."""
    block = _block(fmt.name, most, lowered)
    slack = (most - 1) * block.kernels.encoding.group_bytes
    assert slack <= BLOCK_SLACK
    matrix, x = _integers(fmt, np.random.default_rng(1), most)
    expected = from_bf16(x) @ decode(fmt, matrix).T
    weights = block.weights(fmt, matrix)
    counts = {1, 2, 5, most // 2, most // 2 + 1, most - 1, most}
    for count, cuts in itertools.product(sorted(counts), ([0, GROUPS], [0, 3, GROUPS])):
        encoded = block.tile(x[:count])
        tile = before_a_guard(len(encoded) + slack)
        tile[: len(encoded)] = encoded
        tile[len(encoded) :] = np.resize(np.array([poison], np.uint16).view(np.uint8), slack)
        sums = _sums(most)
        block.run(weights, tile, count, sums, cuts)
        assert np.array_equal(sums[:count], expected[:count]), (count, cuts)


@Lowered
@pytest.mark.parametrize("most", format_kernels(BF16).tile.dots)
def test_sums_are_stored_as_they_are(most: int, lowered: str) -> None:
    """However a call is cut, a token has the bits of a block of one token in one call."""
    rng = np.random.default_rng(2)
    matrix = Matrix(to_bf16(rng.standard_normal((STRIP_ROWS, K))), None)
    x = to_bf16(rng.standard_normal((most, K)))
    block, single = _block(BF16.name, most, lowered), _block(BF16.name, 16, lowered)
    weights = block.weights(BF16, matrix)
    alone = []
    for token in range(most):
        sums = _sums(16)
        single.run(weights, _with_slack(single.tile(x[token : token + 1])), 1, sums, [0, GROUPS])
        alone.append(sums[0])
    for cuts in ([0, GROUPS], [0, 1, 2, 34, GROUPS], [0, 32, GROUPS], [0, 16, 17, GROUPS]):
        sums = _sums(most)
        block.run(weights, _with_slack(block.tile(x)), most, sums, cuts)
        assert np.array_equal(sums, np.array(alone)), cuts


def _with_slack(encoded: Array) -> Array:
    tile = aligned((len(encoded) + BLOCK_SLACK,), np.uint8)
    tile[: len(encoded)] = encoded
    return tile


BLOCK_ROWS = (
    "INT4_ROW_FLOAT32",  # unpacked, a field of rows
    "INT8_ROW_FLOAT32",  # codes as they are, behind fields of rows
    "INT4_G128_FP16_Z1",  # zero points
    "NVFP4",  # halves of a group
    "Q2_K",  # halves with minima
    "Q6_K",  # upper bits, whole bytes
    "IQ4_NL",  # a table of whole bytes
)


@Lowered
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", BLOCK_ROWS)
def test_blocks_have_the_bits_of_vectors(name: str, bits: int, lowered: str) -> None:
    """Of every token alone, whatever lies behind the tile and however a call is cut."""
    fmt, inputs, groups = FORMATS[name], 32 * 40, 40
    kernels, tier = format_kernels(fmt, bits), (RUNNABLE if lowered == "emulated" else QUICK)["amx"]
    assert kernels.tile is not None
    rng = np.random.default_rng(4)
    matrix = random_matrix(fmt, rng, STRIP_ROWS, inputs)
    layout = strip_layout(fmt, inputs)
    strip = before_a_guard(layout.nbytes)
    pack_rows(strip.ctypes.data, range(1), layout, matrix, STRIP_ROWS)
    size = kernels.encoding.group_bytes
    x, rows = to_bf16(rng.standard_normal((16, inputs))), aligned((16, groups, size), np.uint8)
    encode = compile_kernel(encode_rows(kernels.encoding), 7, tier)
    encode(x, 2 * inputs, rows, groups * size, 16, groups, size)

    order = kernels.order(1, tier.registers, tier.registers_per_panel)
    direct = compile_kernel(kernels.direct(1, order), DOT_ARITY, tier)
    expected = aligned((16, STRIP_ROWS), np.float32)
    for token in range(16):
        direct(strip, strip, rows[token], 1, expected[token], 0, groups)

    block = compile_kernel(kernels.tile.dots[16], DOT_ARITY, tier)
    enter = compile_kernel(configure(kernels.tile.config), 0, tier)
    leave = compile_kernel(release, 0, tier)
    unpack = kernels.tile.unpack and compile_kernel(kernels.tile.unpack, 4, tier)
    for count, cuts in itertools.product((1, 7, 16), ([0, groups], [0, 8, 32, groups])):
        tile = before_a_guard((groups * count + 15) * size, 0xFF)
        tile[: groups * count * size] = rows[:count].transpose(1, 0, 2).reshape(-1)
        sums = _sums(16)
        for begin, end in itertools.pairwise(cuts):
            codes = strip
            if unpack:
                codes = before_a_guard((end - begin) * kernels.unpacked_group_bytes)
                unpack(strip, codes, begin, end)
            enter()
            block(codes, strip, tile, count, sums, begin, end)
            leave()
        assert np.array_equal(sums[:count].view(np.uint32), expected[:count].view(np.uint32))


@pytest.fixture
def loads() -> Iterator[list[tuple[int, int, int]]]:
    """Every TILELOADD from now on: (register, address, stride)."""
    emulator().loads = found = []
    yield found
    emulator().loads = None


def _loads_of(loads: Sequence[tuple[int, int, int]], memory: Array) -> list[tuple[int, int, int]]:
    """(register, offset, stride) of those from `memory`."""
    start, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    return [(n, at - start, stride) for n, at, stride in loads if start <= at < end]


def _loaded(fmt: WeightFormat, most: int, loads: list[tuple[int, int, int]]) -> tuple[Any, Any]:
    """What a call for `most` tokens loads of the tile, and of the weights."""
    block = _block(fmt.name, most, "emulated")
    matrix, x = _integers(fmt, np.random.default_rng(3), most)
    weights, tile = block.weights(fmt, matrix), _with_slack(block.tile(x))
    block.run(weights, tile, most, _sums(most), [0, GROUPS])
    return _loads_of(loads, tile), _loads_of(loads, weights)


@Emulated
def test_16_tokens_of_bf16_read_a_strip_in_one_pass(loads: list[tuple[int, int, int]]) -> None:
    """Four panels of a group, in B registers 5, 6 and 7 in turn, then the next group."""
    a, b = _loaded(BF16, 16, loads)
    panels = [(5, 0), (6, 64), (7, 128), (5, 192)]
    size = BF16_STRIP.group_bytes
    assert b == [(n, size * g + at, 256) for g in range(GROUPS) for n, at in panels]
    assert a == [(4, 16 * 64 * g, 64) for g in range(GROUPS)]


@Emulated
def test_32_tokens_of_bf16_read_chunks_twice(loads: list[tuple[int, int, int]]) -> None:
    """32 groups of panels 0 and 1, the same groups of panels 2 and 3, then the groups that remain.
    Every line is read once."""
    a, b = _loaded(BF16, 32, loads)
    order = [
        (g, pair) for chunk in (range(32), range(32, GROUPS)) for pair in (0, 2) for g in chunk
    ]
    size = BF16_STRIP.group_bytes
    assert b == [(6 + p, size * g + 64 * (pair + p), 256) for g, pair in order for p in (0, 1)]
    assert a == [(4 + half, 64 * (32 * g + 16 * half), 64) for g, _ in order for half in (0, 1)]


@Emulated
@pytest.mark.parametrize(
    ("fmt", "size"),
    [
        (MXFP4, unpacked_layout(MXFP4).block_bytes),
        (INT8, strip_layout(INT8, 32).block_bytes),
    ],
    ids=["MXFP4, unpacked", "INT8, packed"],
)
def test_bytes_are_read_in_one_pass(
    fmt: WeightFormat, size: int, loads: list[tuple[int, int, int]]
) -> None:
    """Both planes of a group 80 bytes apart, then its panels, two at a time."""
    a, b = _loaded(fmt, 16, loads)
    assert b == [(2 + p % 2, size * g + 64 * p, 256) for g in range(GROUPS) for p in range(PANELS)]
    planes = (FIXED15_GROUP.high, FIXED15_GROUP.low)
    assert a == [(n, 16 * 80 * g + at, 80) for g in range(GROUPS) for n, at in enumerate(planes)]


# Where the room comes from.


@pytest.mark.parametrize("capacity", [1, 16, 2048])
def test_a_job_has_room_for_whole_blocks(capacity: int) -> None:
    """Behind every place where a tile can lie, and behind the sums of the last batch."""
    for kernels in map(format_kernels, DENSE_FORMATS.values()):
        most = max(kernels.tile.dots)
        assert (most - 1) * kernels.encoding.group_bytes <= BLOCK_SLACK
        assert most <= MOST_BLOCK_TOKENS
        x_row, h_row = (kernels.encoding.row_bytes(groups) for groups in (3, 2))
        shape = JobShape(
            capacity=capacity, top_k=2, experts=4, hidden=96, x_row=x_row, h_row=h_row,
            unpacked_bytes=kernels.unpacked_bytes, workers=2, pools=1,
        )  # fmt: skip
        batch = min(BATCH_TOKENS, 2 * capacity)
        assert shape._areas["x_rows"] >= capacity * x_row + BLOCK_SLACK
        assert shape._areas["h_rows"] >= 2 * capacity * h_row + BLOCK_SLACK
        assert shape._worker_areas["x_offset"] >= batch * x_row + BLOCK_SLACK
        room = shape._worker_areas["sums_offset"]
        assert room >= SUMS_BYTES * (batch + MOST_BLOCK_TOKENS - 1)


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_layer_in_poisoned_memory(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose memory was all NaN gives the bits of one whose memory was zero."""
    case = Case.random(fmt, 224, 160, E=2)  # sizes that no other test's job has left behind
    outputs: dict[int, list[Array]] = {}
    for fill in (0x00, 0xFF):
        init = Workspace.__init__

        def poisoned(self: Workspace, nbytes: int, init: Any = init, fill: int = fill) -> None:
            init(self, nbytes)
            self._arena.bytes[:] = fill

        layer = case.layer(QUICK["amx"])
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "__init__", poisoned)
            outputs[fill] = [
                layer.forward(*random_batch(tokens, 224, 2, 1)) for tokens in (1, 7, 17, 33, 50)
            ]
        layer.close()
    for clean, poisoned_ in zip(*outputs.values(), strict=True):
        assert np.array_equal(clean, poisoned_)
