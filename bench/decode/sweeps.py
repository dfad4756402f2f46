"""Strips of random MXFP4 weights in memory, and what runs over them: kernels, a clock."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from decode.derivation import GROUPS, STRIP, STRIP_BYTES, Body, K, Layout, Step, sweep
from hybrid_moe.cpu_kernels.ceilings.probe import reader
from hybrid_moe.cpu_kernels.dsl.emit import I64, Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15, encode_rows
from hybrid_moe.cpu_kernels.memory import Arena, Workspace
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import STRIP_ROWS, SUMS_BYTES

LINES = STRIP_BYTES // 64
"""Cache lines of a strip."""
_SOURCE_STRIPS = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """Random strips in each layout, and what they give.

    Attributes:
        strips: strips in memory, copies of `_SOURCE_STRIPS`.
        memory: the strips in each layout.
        x: float32 [tokens, K], integers.
        exact: float64 [_SOURCE_STRIPS, tokens, 64].
    """

    strips: int
    memory: Mapping[Layout, Arena]
    x: Array
    exact: Array

    @staticmethod
    def random(nbytes: int, tokens: int, layouts: Collection[Layout] = (STRIP,)) -> Problem:
        """About `nbytes` of strips in each layout, to be multiplied with up to `tokens` tokens.

        Weights are multiples of 1/4 below 12, inputs integers below 128: sums of 4096 products
        stay far below 2^22, so float32 holds every one of them.
        """
        rng = np.random.default_rng(5)
        N = _SOURCE_STRIPS * STRIP_ROWS
        codes = rng.integers(0, 256, (N, K // 2), np.uint8)
        scales = rng.integers(126, 129, (N, GROUPS), np.uint8)
        x = rng.integers(-127, 128, (tokens, K)).astype(np.float32)
        exact = x.astype(np.float64) @ MXFP4.dequantize(codes, scales).astype(np.float64).T
        copies = max(1, nbytes // STRIP_BYTES // _SOURCE_STRIPS)
        strips = copies * _SOURCE_STRIPS
        memory = {layout: Arena(strips * STRIP_BYTES) for layout in layouts}
        for layout, arena in memory.items():
            several = arena.bytes.reshape(copies, _SOURCE_STRIPS, STRIP_BYTES)
            for i in range(_SOURCE_STRIPS):
                rows = slice(i * STRIP_ROWS, (i + 1) * STRIP_ROWS)
                several[:, i] = layout.pack(codes[rows], scales[rows])
        exact = exact.reshape(tokens, _SOURCE_STRIPS, STRIP_ROWS).transpose(1, 0, 2)
        return Problem(strips, memory, x, exact)


class Runner:
    """A compiled sweep over a problem's strips.

    Args:
        encode: x [K] -> its encoded row; None: the library's kernel.
        tile: tokens that meet a strip together; rows of as many are gathered, [group][token].
    """

    def __init__(
        self,
        body: Body,
        problem: Problem,
        tier: Tier,
        *,
        tokens: int = 1,
        layout: Layout = STRIP,
        encode: Callable[[Array], Array] | None = None,
        strips: int = 1,
        tile: int = 1,
    ) -> None:
        self._kernel = _compiled("sweep", 5, sweep(body, tokens, strips), tier)
        self._at = problem.memory[layout].address
        self._problem, self._tokens = problem, tokens
        encoder = _library_encoder(tier) if encode is None else encode
        encoded = np.stack([np.ascontiguousarray(encoder(x)) for x in problem.x[:tokens]])
        tiles = encoded.view(np.uint8).reshape(tokens // tile, tile, GROUPS, -1)
        tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(-1)
        self._memory = Workspace(tiles.nbytes + 64)
        self._x = self._memory.take(tiles.nbytes)
        self._memory.view(self._x, tiles.shape, np.uint8)[...] = tiles
        self._out = Arena(SUMS_BYTES * tokens * problem.strips)

    def run(self, first: int = 0, strips: int | None = None) -> None:
        """Multiply `strips` strips (default all) from the one numbered `first`."""
        out = self._out.address + first * SUMS_BYTES * self._tokens
        at = self._at + first * STRIP_BYTES
        todo = self._problem.strips if strips is None else strips
        self._kernel(at, self._x, out, todo, STRIP_BYTES)

    def repeat(self, times: int) -> None:
        """Multiply the first strip again and again."""
        self._kernel(self._at, self._x, self._out.address, times, 0)

    def check(self) -> None:
        """Raises `SystemExit` unless the sums are float64's."""
        self._out.bytes[:] = 255
        self.run()
        got = self._out.bytes.view(np.float32).reshape(-1, self._tokens, STRIP_ROWS)
        expected = self._problem.exact[:, : self._tokens]
        for first in range(0, len(got), _SOURCE_STRIPS):
            if not np.array_equal(got[first : first + _SOURCE_STRIPS], expected):
                raise SystemExit("sums differ from float64")


def _compiled(name: str, arity: int, body: KernelBody, tier: Tier) -> Callable[..., None]:
    text = build_module([(name, arity, body)], tier, "steps")
    address = compile_functions(text, tier.target, [name], "steps")[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arity)(address)


def _library_encoder(tier: Tier) -> Callable[[Array], Array]:
    kernel = _compiled("encode", 7, encode_rows(FIXED15), tier)

    def encode(x: Array) -> Array:
        source = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        row = np.zeros(FIXED15.row_bytes(GROUPS) + 64, np.uint8)
        start = -row.ctypes.data % 64
        kernel(source.ctypes.data, 0, row.ctypes.data + start, 0, 1, GROUPS, FIXED15.group_bytes)
        return row[start : start + FIXED15.row_bytes(GROUPS)]

    return encode


def step_runner(step: Step, problem: Problem, tier: Tier) -> Runner:
    """The compiled step."""
    return Runner(
        step.body, problem, step.tier(tier),
        layout=step.layout, encode=step.encode, strips=step.strips,
    )  # fmt: skip


Part = tuple[int, int]
"""First strip and number of strips of one timing."""


def parts_of(problem: Problem) -> Iterator[Part]:
    """Parts of 36 MB, each far from the last. Neighbours on the memory come and go: many short
    turns, not few."""
    part = min(problem.strips, 256)
    first = 0
    while True:
        yield first, part
        first = (first + part) % (problem.strips - part + 1)


def speed_of(run: Callable[[int, int], None], part: Part) -> float:
    """GB/s from memory."""
    return part[1] * STRIP_BYTES / seconds(functools.partial(run, *part)) / 1e9


class Ceiling:
    """A plain read of the library's strips."""

    def __init__(self, problem: Problem) -> None:
        starts = np.arange(problem.strips, dtype=np.int64) * STRIP_BYTES
        self._starts = starts + problem.memory[STRIP].address
        self._out = np.zeros(16, np.int32)

    def measure(self, parts: Iterator[Part]) -> float:
        """GB/s, the better of the loops with and without prefetch instructions."""
        runs = [functools.partial(self._read, prefetches) for prefetches in (False, True)]
        return max(speed_of(run, next(parts)) for run in runs)

    def _read(self, prefetches: bool, first: int, strips: int) -> None:
        at = self._starts[first:].ctypes.data
        reader(prefetches)(at, strips, STRIP_BYTES, self._out.ctypes.data)


_CHAIN = 64


def _chain(emit: Emit, turns: Val, out: Val) -> None:
    """Additions that wait for each other: one a cycle."""
    kind = ir.FunctionType(I64, [I64])
    total = emit.var(turns)
    with emit.loop(0, turns):
        for _ in range(_CHAIN):
            added = (total.get() + turns).ir
            unknown = emit.builder.asm(kind, "", "=r,0", [added], False)  # else one product
            total.set(Val(emit, unknown))
    emit.store(out, total.get(), align=8)


class Clock:
    """The core's cycles in a second, by instructions of known latency."""

    def __init__(self, tier: Tier) -> None:
        self._kernel = _compiled("chain", 2, _chain, tier)
        self._out = np.zeros(1, np.int64)

    def measure(self, turns: int = 40_000) -> float:
        """The fastest of a few runs: what stops a run only makes it longer."""
        run = functools.partial(self._kernel, turns, self._out.ctypes.data)
        return turns * _CHAIN / min(seconds(run) for _ in range(5))


def seconds(call: Call) -> float:
    """Processor time of one call in this thread: where others want the core too, their turns do not
    count. Waiting for memory does."""
    start = time.thread_time()
    call()
    return time.thread_time() - start
