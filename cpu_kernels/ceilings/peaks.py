"""Multiply-accumulates per second that the machine can do at most: the ceiling of prefill.

Prefill cannot pass the rate of the instruction that it multiplies with. A peak is measured on a
tile of a few accumulators, with weights in registers and activations broadcast from the first-level
cache: what a dot kernel could reach if decoding, scales and memory were free.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from llvmlite import ir

from hybrid_moe.cpu_kernels.ceilings.bandwidth import repetitions_per_second
from hybrid_moe.cpu_kernels.dsl import tiles
from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, available_tiers, choose_tier
from hybrid_moe.cpu_kernels.dsl.tiles import Tiles
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.kernels.integer_dot import encoding_of
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.formats.weight_format import WeightFormat

ROWS = 16
_WINDOW = 2048  # bytes of activations: well inside a first-level cache
_LEAST_STEPS = 20_000
_LEAST_CALL = 2e-4
_LEAST_CALL_PER_THREAD = 2e-5
"""Seconds: threads take turns at the few lines of Python between two calls of machine code, which
would else hold back the peak of many of them."""
_UNROLL = 4
_TWO_PLANES = "activations in two 8-bit planes: two byte products a product"


@dataclass(frozen=True)
class PeakKernel:
    """A loop of nothing but multiplications.

    Attributes:
        label: names the compiled module; unique per op and shape.
        body: kernel (weights, activations, steps, out); both inputs are filled with one pattern.
        macs_per_step: multiply-accumulates of one step.
        out_bytes: what it stores at the end.
    """

    label: str
    body: KernelBody
    macs_per_step: int
    out_bytes: int


@dataclass(frozen=True)
class MacOp:
    """An op of the vector language that multiplies.

    Attributes:
        name: of the op.
        kernels: the loops to try on a tier, none where the tier has no such op.
        pattern: 32 bits of input that are neither subnormal nor NaN.
    """

    name: str
    kernels: Callable[[Tier], Sequence[PeakKernel]]
    pattern: int


@dataclass(frozen=True)
class _Tile:
    """Accumulators of tokens x panels, 16 lanes each."""

    tokens: int
    panels: int

    @property
    def accumulators(self) -> int:
        return self.tokens * self.panels


_SIZES = tuple(_Tile(*t) for t in ((2, 1), (4, 1), (6, 1), (2, 2), (8, 1), (4, 2), (6, 2)))
"""Tried in turn: which is best differs by the number of registers and their width."""


@dataclass(frozen=True)
class _VectorOp:
    """A dot product of 32-bit lanes: inputs of a lane, and type of a register of weights.

    Attributes:
        start: an accumulator.
        multiply: (emit, accumulator, weights, address of activations) -> accumulator.
        total: an accumulator as 16 lanes of 32 bits.
    """

    name: str
    inputs: int
    weights: tuple[ir.Type, int]
    start: Callable[[Emit], Val]
    multiply: Callable[[Emit, Val, Val, Val], Val]
    total: Callable[[Emit, Val], Val] = lambda emit, accumulator: accumulator

    def kernels(self, tier: Tier) -> list[PeakKernel]:
        """Tiles whose accumulators leave some registers free."""
        room = max(2, (tier.registers - 3) // tier.registers_per_panel)
        return [self._kernel(tile) for tile in _SIZES if tile.accumulators <= room]

    def _kernel(self, tile: _Tile) -> PeakKernel:
        return PeakKernel(
            f"peak_{self.name}_{tile.tokens}x{tile.panels}",
            self._body(tile),
            tile.accumulators * ROWS * self.inputs,
            4 * ROWS * tile.accumulators,
        )

    def _body(self, tile: _Tile) -> KernelBody:
        def body(emit: Emit, weights: Val, activations: Val, steps: Val, out: Val) -> None:
            sums = [
                [emit.var(self.start(emit)) for _ in range(tile.panels)] for _ in range(tile.tokens)
            ]
            w = [emit.load(weights + 64 * p, *self.weights, 64) for p in range(tile.panels)]
            with emit.loop(0, steps, _UNROLL) as step:
                # an address that changes with each step keeps the products inside the loop
                at = activations + ((step * 64) & (_WINDOW - 1))
                for u, t in itertools.product(range(_UNROLL), range(tile.tokens)):
                    for p in range(tile.panels):
                        x = at + (64 * u + 4 * t)
                        sums[t][p].set(self.multiply(emit, sums[t][p].get(), w[p], x))
            for t, p in itertools.product(range(tile.tokens), range(tile.panels)):
                at = out + 64 * (t * tile.panels + p)
                emit.store(at, self.total(emit, sums[t][p].get()).bits(I32), align=4)

        return body


@dataclass(frozen=True)
class _TileOp:
    """A dot product of tile registers: 16 x 16 accumulators, `inputs` for each."""

    name: str
    inputs: int
    multiply: Callable[[Tiles, int, int, int], None]

    def kernels(self, tier: Tier) -> list[PeakKernel]:
        """2 x 2 accumulators, as many as leave registers for their inputs."""
        if not tier.tiles:
            return []
        macs = 4 * tiles.ROWS * ROWS * self.inputs
        return [PeakKernel(f"peak_{self.name}", self._body, macs, 4 * tiles.REGISTER_BYTES)]

    def _body(self, emit: Emit, weights: Val, activations: Val, steps: Val, out: Val) -> None:
        config = tiles.TileConfig((tiles.TileShape(),) * tiles.REGISTERS)
        tiles.configure(config)(emit)
        registers = Tiles(emit, config)
        stride = emit.i64(tiles.ROW_BYTES)
        for accumulator in range(4):
            registers.zero(accumulator)
        for i in range(2):
            registers.load(4 + i, activations, stride)
            registers.load(6 + i, weights, stride)
        with emit.loop(0, steps):
            for a, b in itertools.product(range(2), range(2)):
                self.multiply(registers, 2 * a + b, 4 + a, 6 + b)
        for accumulator in range(4):
            registers.store(accumulator, out + tiles.REGISTER_BYTES * accumulator, stride)
        tiles.release(emit)


def _one_word(name: str) -> Callable[[Emit, Val, Val, Val], Val]:
    """An op that takes 32 bits of activations."""
    return lambda emit, accumulator, w, x: emit.op(name, accumulator, w, emit.load(x, I32, align=4))


def _two_words(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """`wide_dot`: the other 32 bits are as far away as in a group of activations."""
    first, second = (emit.load(x + offset, I32, align=4) for offset in (0, GROUP))
    return emit.op("wide_dot", accumulator, w, first, second)


_BYTE_DOT = _VectorOp(
    "byte_dot", 4, (I8, 64), lambda emit: emit.splat(0, I32, ROWS), _one_word("byte_dot")
)
_WIDE_DOT = _VectorOp(
    "wide_dot",
    4,
    (I8, 64),
    lambda emit: emit.op("wide_start", emit.splat(0, I32)),
    _two_words,
    lambda emit, accumulator: emit.op("wide_total", accumulator),
)
_PAIR_DOT = _VectorOp(
    "pair_dot", 2, (I32, 16), lambda emit: emit.splat(0.0, F32, ROWS), _one_word("pair_dot")
)
_TILE_BYTES = _TileOp("tile_dot_bytes", tiles.ROW_BYTES, Tiles.dot_bytes)
_TILE_PAIRS = _TileOp("tile_dot_pairs", tiles.ROW_BYTES // 2, Tiles.dot_pairs)
_BF16_ONES = 0x3F803F80

MAC_OPS: Mapping[str, MacOp] = MappingProxyType(
    {
        op.name: op
        for op in (
            MacOp("byte_dot", _BYTE_DOT.kernels, 0x01010101),
            MacOp("wide_dot", _WIDE_DOT.kernels, 0x01010101),
            MacOp("pair_dot", _PAIR_DOT.kernels, _BF16_ONES),
            MacOp("tile_dot_bytes", _TILE_BYTES.kernels, 0x01010101),
            MacOp("tile_dot_pairs", _TILE_PAIRS.kernels, _BF16_ONES),
        )
    }
)
"""Every op whose rate is a ceiling."""


@dataclass(frozen=True)
class MacUse:
    """How a format multiplies: `per_product` times `op` for each product of the mathematics."""

    op: str
    per_product: int
    why: str


_SMALL = (MacUse("byte_dot", 2, _TWO_PLANES), MacUse("tile_dot_bytes", 2, _TWO_PLANES))
_WIDE = (
    MacUse("wide_dot", 1, "activations of 15 bits: two byte products, or one of words"),
    MacUse("tile_dot_bytes", 2, _TWO_PLANES),
)
_PAIRS = (
    MacUse("pair_dot", 1, "one product of two bf16"),
    MacUse("tile_dot_pairs", 1, "one product of two bf16"),
)


def _uses_of(fmt: WeightFormat) -> tuple[MacUse, ...]:
    if fmt.code.name in ("bf16", "e4m3"):
        return _PAIRS
    return _WIDE if encoding_of(fmt).wide else _SMALL


USES: Mapping[str, tuple[MacUse, ...]] = MappingProxyType(
    {name: _uses_of(fmt) for name, fmt in FORMATS.items()}
)
"""Ways of each format; its ceiling on a tier is the fastest of those that the tier has."""


def peak_macs(op: MacOp, pool: PoolConfig, tier: Tier, seconds: float = 0.3) -> float | None:
    """Peak multiply-accumulates per second of `op`, all threads of `pool` at once.

    The best of several kernels and runs: a ceiling, which interference only lowers. None where the
    tier has no such op.
    """
    kernels = op.kernels(tier)
    runs = [kernel for kernel in kernels for _ in range(3)]
    rates = [_run(op, kernel, pool, tier, seconds / len(runs)) for kernel in runs]
    return max(rates, default=None)


def _compiled(kernel: PeakKernel, tier: Tier) -> Callable[[int, int, int, int], None]:
    text = build_module([("peak", 4, kernel.body)], tier, kernel.label)
    address = compile_functions(text, tier.target, ["peak"], kernel.label)["peak"]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)


def _run(op: MacOp, kernel: PeakKernel, pool: PoolConfig, tier: Tier, seconds: float) -> float:
    """Multiply-accumulates per second of one kernel."""
    function = _compiled(kernel, tier)
    words = np.full((_WINDOW + 4096) // 4, op.pattern, np.int32)
    aligned = words.ctypes.data + -words.ctypes.data % 64
    outs = [np.zeros(kernel.out_bytes, np.uint8) for _ in range(pool.threads)]

    def call(steps: int, thread: int) -> None:
        function(aligned, aligned + 1024, steps, outs[thread].ctypes.data)

    steps = _enough_steps(call, pool.threads)
    calls_per_second = repetitions_per_second(pool, functools.partial(call, steps), seconds)
    return calls_per_second * steps * kernel.macs_per_step


def _enough_steps(call: Callable[[int, int], None], threads: int) -> int:
    """Steps whose time makes what surrounds `call(steps, thread)` small."""
    steps = _LEAST_STEPS
    while True:
        begin = time.perf_counter()
        call(steps, 0)
        if time.perf_counter() - begin >= max(_LEAST_CALL, _LEAST_CALL_PER_THREAD * threads):
            return steps
        steps *= 2


def mac_ceiling(
    method: str, pool: PoolConfig | int, tier: Tier | None = None, seconds: float = 0.3
) -> float:
    """Peak multiply-accumulates per second of a format: of its fastest way on the tier.

    Raises:
        ValueError: how the format multiplies is not in `USES`.
    """
    if method not in USES:
        raise ValueError(f"no ceiling known for {method}: add how it multiplies to USES")
    config = PoolConfig.choose(pool) if isinstance(pool, int) else pool
    tier = tier or choose_tier()
    rates = [
        rate / use.per_product
        for use in USES[method]
        if (rate := peak_macs(MAC_OPS[use.op], config, tier, seconds)) is not None
    ]
    return max(rates)


def format_ceilings(ops: Mapping[str, float]) -> dict[str, float]:
    """`mac_ceiling` of every format that multiplies with one of these ops.

    Args:
        ops: op -> its peak.
    """
    found: dict[str, float] = {}
    for name, uses in USES.items():
        rates = [ops[use.op] / use.per_product for use in uses if use.op in ops]
        if rates:
            found[name] = max(rates)
    return found


def op_peaks(pool: PoolConfig, tier: Tier | None = None, seconds: float = 0.3) -> dict[str, float]:
    """Peak of each op that the tier has, multiply-accumulates per second."""
    tier = tier or choose_tier()
    found = {name: peak_macs(op, pool, tier, seconds) for name, op in MAC_OPS.items()}
    return {name: rate for name, rate in found.items() if rate is not None}


@dataclass(frozen=True)
class MacCeiling:
    """Peak of one op on one tier, 10^9 multiply-accumulates per second.

    Attributes:
        one_thread, all_threads: the op's own.
        formats: format of `DENSE_FORMATS` -> what is left of `all_threads` for it, if it multiplies
            this way.
    """

    tier: str
    op: str
    threads: int
    one_thread: float
    all_threads: float
    formats: Mapping[str, float]


def mac_ceilings(tier: Tier, op: MacOp, threads: int, seconds: float = 0.5) -> MacCeiling | None:
    """The op's peak on one and on all threads; None where the tier does not have it."""
    peaks = [
        peak_macs(op, pool, tier, seconds / 2)
        for pool in (PoolConfig(1), PoolConfig.choose(threads))
    ]
    one, every = (None if peak is None else peak / 1e9 for peak in peaks)
    if one is None or every is None:
        return None
    formats = {
        name: every / use.per_product for name in DENSE_FORMATS for use in USES[name]
        if use.op == op.name
    }  # fmt: skip
    return MacCeiling(tier.name, op.name, threads, one, every, formats)


def usable_tiers(names: Iterable[str] = ()) -> tuple[list[Tier], dict[str, str]]:
    """Tiers that run here (of `names`, default all), and what the others lack.

    Raises:
        ValueError: no such tier.
    """
    reports = {report.tier.name: report for report in available_tiers()}
    wanted = list(names) or list(reports)
    unknown = [name for name in wanted if name not in reports]
    if unknown:
        raise ValueError(f"no tier {unknown[0]}: there are {', '.join(reports)}")
    chosen = [reports[name] for name in wanted]
    skipped = {r.tier.name: ", ".join(r.missing) for r in chosen if not r.usable}
    return [r.tier for r in chosen if r.usable], skipped
