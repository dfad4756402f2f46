"""The derivation in docs/kernels.md, measured: each step of the MXFP4 decode kernel.

    python bench/steps.py

One thread multiplies strips of 64 rows x 4096 inputs with one token: once the same strip again and
again, from the second-level cache, once 36 of 512 MiB, from memory. Steps take turns.
Before and after each the read bandwidth is measured, and the core's cycles are counted, so that all
columns are of the same moment; figures are medians over rounds, of cycles from the cache the fewest
(what else runs on a core only adds), and of time that this thread had a core. Inputs are such that
no addition rounds: before it is timed, each step's sums must equal those of float64, bit for bit.

Further tables: several tokens that share the stream, in the library's two ways; the kernel on one
thread and on two; its instructions on every x86 tier, whether this processor has it or not.
"""

from __future__ import annotations

import functools
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from decode.derivation import (
    GROUPS,
    KERNEL,
    STEPS,
    STRIP,
    STRIP_BYTES,
    Body,
    K,
    Step,
    direct,
    sweep,
    unpacked,
)
from decode.instructions import ZEN3, ZEN4, Instruction, count, fewest_cycles
from decode.sweeps import (
    LINES,
    Ceiling,
    Clock,
    Problem,
    Runner,
    parts_of,
    seconds,
    speed_of,
    step_runner,
)
from harness import parse_list, parser
from rich.console import Console
from tables import STEPS as COLUMNS
from tables import show

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe, repetitions_per_second
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, choose_tier, host_features
from hybrid_moe.cpu_kernels.jit.compile import assembly
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.library import functions_of, kernel_set
from hybrid_moe.cpu_kernels.kernels.order import fixed15_order
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.cpu_kernels.tuning import BLOCK_TURN_TOKENS, TURN_GROUPS, UNPACK_GROUPS
from hybrid_moe.formats.strips import PANELS, STRIP_ROWS
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

TOKENS = (1, 2, 3, 4, 5, 6, 12, 24, 48)
_REPEATS = 64
_TURNS = 6

Point = dict[str, Any]


def _medians(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def _counts(body: Body, tier: Tier, trips: Sequence[int], strips: int = 1) -> Counter[Instruction]:
    """Instructions of one call of `body`."""
    text = build_module([("sweep", 5, sweep(body, strips=strips))], tier, "steps")
    return count(assembly(text, tier.target), "sweep", (1, *trips))


def step_counts(step: Step, tier: Tier) -> Counter[Instruction]:
    """Instructions of one call of a step."""
    return _counts(step.body, step.tier(tier), step.trips, step.strips)


def _cached(runner: Runner) -> float:
    """Seconds for a strip in the second-level cache."""
    runner.repeat(_REPEATS)
    run = functools.partial(runner.repeat, _REPEATS)
    return min(seconds(run) for _ in range(5)) / _REPEATS


def measure_steps(problem: Problem, tier: Tier, rounds: int) -> list[Point]:
    """One point for each step."""
    steps = [s for s in STEPS.values() if not s.x86 or "avx2" in tier.all_features]
    runners = {step.name: step_runner(step, problem, tier) for step in steps}
    for runner in runners.values():
        runner.check()
    ceiling, clock, parts = Ceiling(problem), Clock(tier), parts_of(problem)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for _ in range(rounds * _TURNS):
        before = ceiling.measure(parts)
        for name, runner in runners.items():
            Hz = clock.measure()
            cached = _cached(runner)
            speed = speed_of(runner.run, next(parts))
            after = ceiling.measure(parts)
            read, strip = (before + after) / 2, STRIP_BYTES / speed / 1e9
            before = after
            samples[name].append({
                "cached_ns": cached * 1e9,
                "cycles": strip * Hz / LINES,
                "GBps": speed,
                "share": 100 * speed / read,
                "read_GBps": read,
                "GHz": Hz / 1e9,
            })  # fmt: skip
    return [_step_point(step, tier, samples[step.name]) for step in steps]


def _step_point(step: Step, tier: Tier, samples: Sequence[Mapping[str, float]]) -> Point:
    counts, lines = step_counts(step, tier), LINES * step.strips
    core = ZEN4 if "avx512f" in host_features() else ZEN3
    limit, fewest = fewest_cycles(counts, core)
    medians = _medians(samples)
    return {
        "step": step.name,
        "instructions": sum(counts.values()) / lines,
        "limit": limit,
        "cycles_counted": fewest / lines,
        **medians,
        "cycles_cached": min(s["cached_ns"] for s in samples) * medians["GHz"] / LINES,
    }


def measure_tokens(problem: Problem, tier: Tier, rounds: int) -> list[Point]:
    """Both ways of the library for several tokens that share the stream."""
    largest = kernel_set("MXFP4", tier).direct.most
    runners: dict[tuple[int, str], Runner] = {}
    for tokens in TOKENS:
        most = max(size for size in range(1, largest + 1) if tokens % size == 0)
        for way, body in (
            ("direct", direct(tokens, most)),
            ("unpacked", unpacked(tokens, most, UNPACK_GROUPS)),
        ):
            runners[tokens, way] = Runner(body, problem, tier, tokens=tokens, tile=most)
    for runner in runners.values():
        runner.check()
    ceiling, parts = Ceiling(problem), parts_of(problem)
    samples: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in TOKENS}
    for _ in range(rounds):
        read = ceiling.measure(parts)
        for tokens in TOKENS:
            ways = {way: runners[tokens, way] for way in ("direct", "unpacked")}
            speed = max(speed_of(runner.run, next(parts)) for runner in ways.values())
            cached = {
                f"{way}_cached": tokens * STRIP_ROWS * K / _cached(runner) / 1e9
                for way, runner in ways.items()
            }
            point = {"GBps": speed, "share": 100 * speed / read, **cached, "read_GBps": read}
            samples[tokens].append(point)
    return [{"tokens": tokens, **_medians(samples[tokens])} for tokens in TOKENS]


def measure_threads(problem: Problem, tier: Tier, rounds: int) -> list[Point]:
    """The kernel on one thread and on two, each on its own part."""
    points = []
    for threads in sorted({1, min(2, usable_cores())}):
        pool = PoolConfig(threads)
        runners = [step_runner(KERNEL, problem, tier) for _ in range(threads)]
        probe, part = ReadProbe(pool), problem.strips // threads

        def read(thread: int, runners: list[Runner] = runners, part: int = part) -> None:
            runners[thread].run(thread * part, part)

        samples = []
        for _ in range(rounds):
            reads = [probe.measure(0.1)]
            speed = repetitions_per_second(pool, read, 0.2) * part * STRIP_BYTES / 1e9
            reads.append(probe.measure(0.1))
            ceiling = statistics.mean(reads)
            samples.append({"GBps": speed, "share": 100 * speed / ceiling, "read_GBps": ceiling})
        points.append({"threads": threads, **_medians(samples)})
    return points


def count_tiers() -> list[Point]:
    """Instructions of the library's kernels: one token, and its largest tile on unpacked codes."""
    points = []
    for tier in TIERS.values():
        if platform.machine() == "x86_64" and "neon" not in tier.all_features:
            one = step_counts(KERNEL, tier)
            most, many = tile_counts(tier)
            points.append({
                "tier": tier.name,
                "instructions": sum(one.values()) / LINES,
                "tile": most,
                "tile_instructions": sum(many.values()) / LINES / most,
            })  # fmt: skip
    return points


def tile_counts(tier: Tier) -> tuple[int, Counter[Instruction]]:
    """Tokens of the largest kernel on unpacked codes, and its instructions for a strip."""
    functions = {name: body for name, _, body in functions_of("MXFP4", tier)}
    kind = "block" if tier.tiles else "tiled"
    most = max(int(name[len(kind) :]) for name in functions if name.startswith(kind))
    name = f"{kind}{most}"
    text = build_module([(name, DOT_ARITY, functions[name])], tier, "steps")
    order = fixed15_order(most, tier.registers, tier.registers_per_panel)
    if tier.tiles:
        trips = (GROUPS, most // BLOCK_TURN_TOKENS)
    else:  # two panels take turns with two, or all four follow each other in memory
        trips = (GROUPS // TURN_GROUPS, TURN_GROUPS) if order.kept else (GROUPS, PANELS)
    return most, count(assembly(text, tier.target), name, trips)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", type=parse_list, default="steps,tokens,threads,tiers")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--mib", type=int, default=512, help="of strips, in each layout")
    arguments.add_argument("--isa", help="tier (default: the best here)")
    args = arguments.parse_args()
    tier = choose_tier(args.isa)
    layouts = {step.layout for step in STEPS.values()} if "steps" in args.parts else {STRIP}
    problem = Problem.random(args.mib << 20, max(TOKENS), layouts)
    parts: Mapping[str, Callable[[], list[Point]]] = {
        "steps": lambda: measure_steps(problem, tier, args.rounds),
        "tokens": lambda: measure_tokens(problem, tier, args.rounds),
        "threads": lambda: measure_threads(problem, tier, args.rounds),
        "tiers": count_tiers,
    }
    unknown = [part for part in args.parts if part not in parts]
    if unknown:
        raise SystemExit(f"no part {unknown[0]}: there are {', '.join(parts)}")
    console = Console()
    console.print(f"{processor()}, tier {tier.name}")
    points = []
    for part in args.parts:
        measured = parts[part]()
        reads = [point["read_GBps"] for point in measured if "read_GBps" in point]
        title = f"{part}; {statistics.median(reads):.1f} GB/s are read" if reads else part
        show(console, title, COLUMNS, measured)
        points += [{"part": part, **point} for point in measured]
    write_receipt(args.json, receipt("steps", isa=tier.name, points=points))


if __name__ == "__main__":
    main()
