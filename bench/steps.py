"""The derivation in docs/kernels.md, measured: each step of the MXFP4 decode kernel.

    python bench/steps.py

One thread multiplies strips of 32 rows x 4096 inputs with one token: once a few strips that stay
in the second-level cache, once 512 MiB that come from memory. Steps take turns, and each round
reads memory and counts a core's cycles too, so that all columns are of the same seconds; figures
are medians over rounds. Inputs are such that no addition rounds: before it is timed, each step's
sums must equal those of float64, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import parse_list, processor, receipt, write_receipt
from derivation import GROUP_BYTES, STEPS, Body, Step, direct, sweep, unpacked
from instructions import count, fewest_cycles
from llvmlite import ir
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.bandwidth import ReadProbe, repetitions_per_second
from hybrid_moe.cpu_kernels.dsl.emit import I64, Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, choose_tier
from hybrid_moe.cpu_kernels.jit.compile import assembly, compile_functions
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15, encode_rows
from hybrid_moe.cpu_kernels.kernels.formats import FORMAT_KERNELS
from hybrid_moe.cpu_kernels.kernels.library import kernel_set, tile_sizes
from hybrid_moe.cpu_kernels.memory import Arena, Workspace
from hybrid_moe.cpu_kernels.pack import pack_rows
from hybrid_moe.cpu_kernels.panels import STRIP_ROWS, strip_layout
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats import MXFP4, Array
from hybrid_moe.tensors import Matrix

K = 4096
GROUPS = K // 32
STRIP_BYTES = GROUPS * GROUP_BYTES
LINES = STRIP_BYTES // 64
_SOURCE_STRIPS = 64
_CACHED_STRIPS = 4  # 278 KB
TOKENS = (1, 2, 3, 6, 12, 24, 48)
MOST_TOKENS = max(TOKENS)

Call = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """Random strips in both layouts, and what they give.

    Attributes:
        strips: strips in memory, copies of `_SOURCE_STRIPS`.
        rows, panels: addresses of the first strip in the checkpoint's layout and as panels.
        x: float32 [MOST_TOKENS, K], integers.
        exact: float64 [_SOURCE_STRIPS, MOST_TOKENS, 32].
        keep: owners of the memory.
    """

    strips: int
    rows: int
    panels: int
    x: Array
    exact: Array
    keep: tuple[Arena, ...]

    @staticmethod
    def random(nbytes: int) -> Problem:
        """About `nbytes` of strips in each layout.

        Weights are multiples of 1/4 below 12, inputs integers below 128: sums of 4096 products
        stay far below 2^22, so float32 holds every one of them.
        """
        rng = np.random.default_rng(5)
        N = _SOURCE_STRIPS * STRIP_ROWS
        codes = rng.integers(0, 256, (N, K // 2), np.uint8)
        scales = rng.integers(126, 129, (N, GROUPS), np.uint8)
        x = rng.integers(-127, 128, (MOST_TOKENS, K)).astype(np.float32)
        exact = x.astype(np.float64) @ MXFP4.dequantize(codes, scales).astype(np.float64).T
        strips = max(1, nbytes // STRIP_BYTES // _SOURCE_STRIPS) * _SOURCE_STRIPS
        rows, panels = (Arena(strips * STRIP_BYTES) for _ in range(2))
        first = _SOURCE_STRIPS * STRIP_BYTES
        by_strip = (codes.reshape(_SOURCE_STRIPS, -1), scales.reshape(_SOURCE_STRIPS, -1))
        rows.bytes[:first] = np.concatenate(by_strip, axis=1).reshape(-1)
        every = range(_SOURCE_STRIPS)
        pack_rows(panels.address, every, strip_layout(MXFP4, K), Matrix(codes, scales), N)
        for arena in (rows, panels):
            arena.bytes.reshape(-1, first)[1:] = arena.bytes[:first]
        exact = exact.reshape(MOST_TOKENS, _SOURCE_STRIPS, STRIP_ROWS).transpose(1, 0, 2)
        return Problem(strips, rows.address, panels.address, x, exact, (rows, panels))


class Runner:
    """A compiled sweep over a problem's strips.

    Args:
        encode: x [K] -> its encoded row; None: the library's kernel.
    """

    def __init__(
        self,
        body: Body,
        problem: Problem,
        tier: Tier,
        *,
        tokens: int = 1,
        by_rows: bool = False,
        encode: Callable[[Array], Array] | None = None,
        strips: int = 1,
    ) -> None:
        self._kernel = _compiled("sweep", 6, sweep(body, tokens, strips), tier)
        self._at = problem.rows if by_rows else problem.panels
        self._problem, self._tokens = problem, tokens
        encoder = _library_encoder(tier) if encode is None else encode
        encoded = [np.ascontiguousarray(encoder(x)).view(np.uint8) for x in problem.x[:tokens]]
        memory = Workspace((encoded[0].nbytes + 64) * tokens + 64 * (tokens + 1))
        pointers = np.zeros(tokens, np.int64)
        for t, row in enumerate(encoded):
            pointers[t] = memory.take(row.nbytes)
            memory.view(int(pointers[t]), row.shape, np.uint8)[...] = row
        self._rows = memory.take(8 * tokens)
        memory.view(self._rows, (tokens,), np.int64)[...] = pointers
        self._memory = memory
        self._out = Arena(4 * STRIP_ROWS * tokens * problem.strips)

    def run(self, first: int = 0, strips: int | None = None) -> None:
        """Multiply `strips` strips (default all) from the one numbered `first`."""
        out = self._out.address + first * 4 * STRIP_ROWS * self._tokens
        at = self._at + first * STRIP_BYTES
        todo = self._problem.strips if strips is None else strips
        self._kernel(at, self._rows, out, todo, STRIP_BYTES, GROUPS)

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
    kernel = _compiled("encode", 6, encode_rows(FIXED15), tier)

    def encode(x: Array) -> Array:
        source = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        row = np.zeros(FIXED15.row_bytes(GROUPS) + 64, np.uint8)
        start = -row.ctypes.data % 64
        kernel(source.ctypes.data, 0, row.ctypes.data + start, 0, 1, GROUPS)
        return row[start : start + FIXED15.row_bytes(GROUPS)]

    return encode


def step_runner(step: Step, problem: Problem, tier: Tier) -> Runner:
    """The compiled step."""
    return Runner(
        step.body, problem, step.tier(tier),
        by_rows=step.by_rows, encode=step.encode, strips=step.strips,
    )  # fmt: skip


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

    def measure(self, turns: int = 400_000) -> float:
        return turns * _CHAIN / seconds(lambda: self._kernel(turns, self._out.ctypes.data))


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_counts(step: Step, tier: Tier) -> Any:
    """Instructions of one strip, with their numbers."""
    own = step.tier(tier)
    text = build_module([("sweep", 6, sweep(step.body, strips=step.strips))], own, "steps")
    return count(assembly(text, own.target), "sweep", (1, *step.trips(GROUPS)))


def measure_steps(problem: Problem, tier: Tier, rounds: int) -> list[dict[str, Any]]:
    """One point for each step: medians over `rounds`, all steps in each."""
    steps = [step for step in STEPS.values() if not step.x86 or tier.name != "portable"]
    runners = {step.name: step_runner(step, problem, tier) for step in steps}
    for runner in runners.values():
        runner.check()
    probe, clock = ReadProbe(PoolConfig(1)), Clock(tier)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for _ in range(rounds):
        reads = [probe.measure(0.05)]
        cycles = clock.measure()
        now: dict[str, dict[str, float]] = {}
        for step in steps:
            run, cached = runners[step.name].run, max(_CACHED_STRIPS, step.strips)
            run(0, cached)
            inside = min(seconds(lambda run=run, n=cached: run(0, n)) for _ in range(5)) / cached
            outside = seconds(run) / problem.strips
            now[step.name] = {
                "cycles_cached": inside * cycles / LINES,
                "cycles": outside * cycles / LINES,
                "GBps": STRIP_BYTES / outside / 1e9,
            }
        reads.append(probe.measure(0.05))
        for name, sample in now.items():
            samples[name].append(
                {**sample, "read_GBps": statistics.mean(reads), "GHz": cycles / 1e9}
            )
    return [_step_point(step, tier, samples[step.name]) for step in steps]


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    ratios = [{**s, "share": s["GBps"] / s["read_GBps"]} for s in samples]
    return {key: statistics.median(s[key] for s in ratios) for key in ratios[0]}


def _step_point(step: Step, tier: Tier, samples: list[dict[str, float]]) -> dict[str, Any]:
    counts = step_counts(step, tier)
    lines = LINES * step.strips
    limit, fewest = fewest_cycles(counts)
    return {
        "step": step.name,
        "instructions": sum(counts.values()) / lines,
        "limit": limit,
        "cycles_counted": fewest / lines,
        **_medians(samples),
    }


def measure_tokens(problem: Problem, tier: Tier, rounds: int) -> list[dict[str, Any]]:
    """Both ways of the library for several tokens that share the stream."""
    sizes = tile_sizes(tier, FORMAT_KERNELS["MXFP4"].reserved_registers)
    chunk = kernel_set("MXFP4", tier).chunk_groups
    runners: dict[tuple[str, int], Runner] = {}
    for tokens in TOKENS:
        most = max(size for size in sizes if tokens % size == 0)
        bodies = {"direct": direct(tokens, most), "unpacked": unpacked(tokens, most, chunk)}
        for way, body in bodies.items():
            runners[way, tokens] = Runner(body, problem, tier, tokens=tokens)
    for runner in runners.values():
        runner.check()
    probe = ReadProbe(PoolConfig(1))
    part = min(problem.strips, 16 * _SOURCE_STRIPS)  # beyond the cache, and enough
    samples: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in runners}
    for turn in range(rounds):
        read = probe.measure(0.05)
        first = turn * part % (problem.strips - part + 1)
        for key, runner in runners.items():
            once = seconds(lambda run=runner.run, at=first: run(at, part)) / part
            samples[key].append({
                "GBps": STRIP_BYTES / once / 1e9,
                "GMACps": key[1] * STRIP_ROWS * K / once / 1e9,
                "read_GBps": read,
            })  # fmt: skip
    return [
        {"way": way, "tokens": tokens, **_medians(samples[way, tokens])}
        for way, tokens in runners
    ]  # fmt: skip


def measure_threads(problem: Problem, tier: Tier, rounds: int) -> list[dict[str, Any]]:
    """The kernel on one thread and on all, each on its own part."""
    step = list(STEPS.values())[-1]
    points = []
    for threads in sorted({1, min(2, len(PoolConfig().worker_cpus()))}):
        pool = PoolConfig(threads)
        runners = [step_runner(step, problem, tier) for _ in range(threads)]
        probe, part = ReadProbe(pool), problem.strips // threads

        def read(thread: int, runners: list[Runner] = runners, part: int = part) -> None:
            runners[thread].run(thread * part, part)

        samples = []
        for _ in range(rounds):
            before = probe.measure(0.1)
            rate = repetitions_per_second(pool, read, 0.2) * part * STRIP_BYTES
            ceiling = statistics.mean((before, probe.measure(0.1)))
            samples.append({"GBps": rate / 1e9, "read_GBps": ceiling})
        points.append({"threads": threads, **_medians(samples)})
    return points


def count_tiers() -> Iterator[dict[str, Any]]:
    """The kernel's instructions on every x86 tier, whether this processor has it or not."""
    step = list(STEPS.values())[-1]
    for tier in TIERS.values():
        if tier.name != "portable":
            yield {"tier": tier.name, "instructions": _per_line(step, tier)}


def _per_line(step: Step, tier: Tier) -> float:
    return sum(step_counts(step, tier).values()) / (LINES * step.strips)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="steps,tokens,threads,tiers", help="which tables")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--mib", type=int, default=512, help="of strips, in each layout")
    parser.add_argument("--isa", help="tier (default: the best here)")
    parser.add_argument("--json", metavar="FILE", help="write a receipt")
    args = parser.parse_args()
    tier = choose_tier(args.isa)
    problem = Problem.random(args.mib << 20)
    tables: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
        "steps": lambda: measure_steps(problem, tier, args.rounds),
        "tokens": lambda: measure_tokens(problem, tier, args.rounds),
        "threads": lambda: measure_threads(problem, tier, args.rounds),
        "tiers": lambda: list(count_tiers()),
    }
    console = Console()
    console.print(f"{processor()}, tier {tier.name}")
    points = []
    for part in parse_list(args.parts):
        rows = tables[part]()
        show(console, part, rows)
        points += [{"part": part, **row} for row in rows]
    write_receipt(args.json, receipt("steps", isa=tier.name, points=points))


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """A table with a column for each key."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(
            *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        )
    console.print(table)


if __name__ == "__main__":
    main()
