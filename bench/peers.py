"""Our MoE layer against other libraries: same shapes, threads and random experts, in turn.

    python bench/peers.py --targets
    python bench/peers.py --formats
    python bench/peers.py --methods MXFP4 --shapes A --tokens 1,64 --kt-python VENV/bin/python

Each library runs in a process of its own that is stopped (SIGSTOP) while another one runs, since
idle threads of most libraries spin. A point is measured in several rounds, each library once per
round and the read bandwidth around each, so that all see the same neighbours; ratios are medians
over rounds of the peer's time over ours in the same round.

Ours stands beside two ceilings: what the same threads read around it, and the rate at which the
tier's instructions decode the format (`decode.counted`) at the clock of that moment.

Where the libraries come from: bench/README.md. Those that are not found are left out, and so is
kt-kernel where no core is spare: its queue thread busy-waits through a call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import comparison
from comparison import FORMAT_TARGETS, NARROW_TARGETS, OUR_ERROR, OURS, PEERS, TARGETS
from decode.counted import counted_rate
from decode.sweeps import Clock
from harness import Reads, layer_parser, parse_list, time_beside_reads, weight_bytes
from peer.find import Place, find_ggml, find_kt, ggml_avx2, those_found
from peer.interface import UnavailableError
from peer.process import WorkerProcess
from problem import SHAPES, Shape, batches_for, random_batches
from rich.console import Console
from tables import ERRORS, show
from weights import activation_bits, format_of, stored_method

from hybrid_moe.cpu_kernels.ceilings.peaks import MAC_OPS, mac_ceiling, peak_macs
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

NAMES = (OURS, *PEERS)


@dataclass
class Point:
    """One library at one batch size. `rounds_ms`: median of each round; bandwidths in GB/s."""

    library: str
    label: str
    method: str
    shape: str
    tokens: int
    threads: int
    rounds_ms: list[float] = field(default_factory=list)
    read_bandwidths: list[float] = field(default_factory=list)
    one_thread_reads: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    weight_bytes: float = 0.0
    macs: float = 0.0
    our_ceiling: float = 0.0
    counted_rate: float | None = None
    spare_cores: int = 0
    ours_is_faster: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def read_bandwidth(self) -> float:
        return statistics.median(self.read_bandwidths)


def places(args: argparse.Namespace, console: Console) -> dict[str, Place]:
    """Where each wanted library is; those that are nowhere are reported."""
    found: dict[str, Place | None] = {
        OURS: Place(sys.executable, {}),
        "torch": Place(sys.executable, {}),
        "ggml": find_ggml(args.ggml_lib or (ggml_avx2() if args.isa == "avx2" else None)),
        "kt-kernel": find_kt(args.kt_python, args.kt_path),
    }
    unknown = [name for name in args.libraries if name not in found]
    if unknown:
        raise SystemExit(f"unknown library {unknown[0]}: there are {', '.join(NAMES)}")
    return those_found(args.libraries, found, console)


def set_up(
    libraries: dict[str, Place], console: Console, threads: int, **problem: Any
) -> list[WorkerProcess]:
    """Load the layer in each; those that cannot are reported and closed."""
    ready = []
    for name, place in libraries.items():
        if name == "kt-kernel" and threads >= usable_cores():
            console.print(f"[yellow]kt-kernel is left out:[/] no core is spare of {threads}")
            continue
        worker = WorkerProcess(name, place, threads)
        console.log(f"{name}: loading {problem['method']}, shape {problem['shape']}")
        try:
            worker.load(threads=threads, **problem)
            ready.append(worker)
        except (RuntimeError, UnavailableError) as reason:
            console.print(f"[yellow]{name} is left out:[/] {reason}")
            worker.close()
    return ready


class Pace:
    """Which libraries are too slow for which batches: no point takes minutes."""

    def __init__(self, longest_call: float) -> None:
        self._longest = longest_call
        self._last: dict[str, tuple[float, float]] = {}

    def expects(self, library: str, distinct: float) -> bool:
        """Whether a call that touches `distinct` experts should be short enough.

        A call takes at least as much longer than the last one as it touches more experts.
        """
        experts, seconds = self._last.get(library, (distinct, 0.0))
        return seconds * max(1.0, distinct / experts) <= self._longest

    def saw(self, library: str, distinct: float, seconds: float) -> bool:
        """Note a call; whether it was short enough."""
        self._last[library] = (distinct, seconds)
        return seconds <= self._longest


@dataclass(frozen=True)
class Bench:
    """What all points of one number of threads share."""

    threads: int
    rounds: int
    seconds: float
    seed: int
    reads: Reads


def measure(
    bench: Bench,
    workers: list[WorkerProcess],
    shape: Shape,
    method: str,
    tokens: int,
    pace: Pace,
    ceiling: float,
    counted: float | None = None,
) -> list[Point]:
    """One batch size, all libraries in turn.

    Args:
        ceiling: multiply-accumulates per second of our tier's instruction for the method.
        counted: GB/s at which our tier's instructions decode it, all threads; None: not counted.
    """
    batches = random_batches(shape, tokens, batches_for(tokens), bench.seed)
    distinct = statistics.mean(b.distinct_experts for b in batches)
    nbytes = weight_bytes(method, shape, batches)
    points: dict[str, Point] = {}
    for worker in workers:
        if worker.name != OURS and not pace.expects(worker.name, distinct):
            continue
        seconds = worker.ask("prepare", tokens=tokens, seed=bench.seed)["seconds"]
        if pace.saw(worker.name, distinct, seconds) or worker.name == OURS:
            points[worker.name] = Point(
                worker.name, worker.label, method, shape.name, tokens, bench.threads,
                weight_bytes=nbytes, macs=float(shape.macs(tokens)), our_ceiling=ceiling,
                spare_cores=usable_cores() - bench.threads, counted_rate=counted,
            )  # fmt: skip
    for _ in range(bench.rounds):
        for worker in workers:
            if worker.name in points:
                timing = time_beside_reads(partial(worker.run, bench.seconds), bench.reads)
                point = points[worker.name]
                point.rounds_ms.append(1e3 * timing.median)
                point.one_thread_reads.append(timing.reads[0])
                point.read_bandwidths.append(timing.reads[1])
                point.others.append(timing.calls.others)
    if OURS in points:
        for point in points.values():
            pairs = zip(point.rounds_ms, points[OURS].rounds_ms, strict=True)
            point.ours_is_faster = statistics.median(theirs / mine for theirs, mine in pairs)
    return list(points.values())


def accuracy(
    libraries: dict[str, Place], method: str, threads: int, console: Console
) -> list[dict[str, Any]]:
    """Relative error of each library against float64, on a small problem."""
    rows = []
    for worker in set_up(libraries, console, threads, shape="small", method=method, max_tokens=64):
        errors = [
            worker.ask("error", tokens=16, seed=3, outliers=outliers)["error"]
            for outliers in (0, 8)
        ]
        rows.append(
            {"library": worker.name, "label": worker.label, "method": method,
             "normal": errors[0], "outliers": errors[1]}
        )  # fmt: skip
        worker.close()
    return rows


def series(args: argparse.Namespace) -> dict[tuple[str, str], list[int]]:
    """(method, shape) -> batch sizes: the targets' (of the named methods, or all), or every
    combination of the options."""
    if args.targets or args.formats:
        wanted: dict[tuple[str, str], list[int]] = {}
        tokens = args.tokens if "--tokens" in sys.argv else None
        formats = NARROW_TARGETS if args.isa == "avx2" else FORMAT_TARGETS
        for target in formats if args.formats else TARGETS:
            named = args.methods == ["all"] or stored_method(target.method) in args.methods
            if named and (tokens is None or target.tokens in tokens):
                wanted.setdefault((target.method, target.shape), []).append(target.tokens)
        return {key: sorted(tokens) for key, tokens in wanted.items()}
    return {(method, s.name): args.tokens for method in args.methods for s in args.shapes}


def parse_arguments() -> argparse.Namespace:
    cores = usable_cores()
    parser = layer_parser(__doc__, "MXFP4", ",".join(str(n) for n in (cores - 1, cores) if n))
    parser.add_argument("--targets", action="store_true", help="the points that have targets")
    parser.add_argument(
        "--formats",
        action="store_true",
        help="every format (of --methods, or all) at one token and 1024, and its bars",
    )
    parser.add_argument("--isa", help="our tier, and kt-kernel's variant; default: the best")
    parser.add_argument("--libraries", type=parse_list, default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, help="default: 3; of --formats 5")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each library and round")
    parser.add_argument(
        "--longest-call", type=float, help="skip slower points; default: 3 s, of --formats 10"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kt-python", help="Python of an environment with kt-kernel and torch")
    parser.add_argument("--kt-path", help="folder of `pip install --target` with kt-kernel")
    parser.add_argument("--ggml-lib", help="folder with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--no-accuracy", action="store_true")
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.formats else 3)
    args.longest_call = args.longest_call or (10.0 if args.formats else 3.0)
    if (args.formats or args.targets) and "--methods" not in sys.argv:
        args.methods = ["all"]
    return args


def ceilings(method: str, pool: PoolConfig, isa: str | None) -> tuple[float, float | None]:
    """(multiply-accumulates per second of our tier's instruction, counted decode rate in GB/s);
    zero and None where our kernels do not have the format."""
    fmt, bits, tier = format_of(method), activation_bits(method), choose_tier(isa)
    if not has_kernels(fmt):
        return 0.0, None
    if bits == 8:  # one product of bytes for each of the mathematics
        found = [peak_macs(MAC_OPS[op], pool, tier) for op in ("byte_dot", "tile_dot_bytes")]
        peak = max(rate for rate in found if rate is not None)
    else:
        peak = mac_ceiling(fmt.name, pool, tier)
    return peak, counted_rate(fmt, tier, Clock(tier).measure(), pool.threads, bits)


def main() -> None:
    args = parse_arguments()
    console = Console(width=180 if args.formats else 140)
    libraries = places(args, console)
    if args.isa:
        choose_tier(args.isa)
        for place in libraries.values():
            place.variables["HYBRID_MOE_ISA"] = args.isa
        if args.isa == "avx2" and "kt-kernel" in libraries:
            libraries["kt-kernel"].variables["KT_KERNEL_CPU_VARIANT"] = "avx2"
        if args.isa == "avx2" and "ggml" in libraries and not (args.ggml_lib or ggml_avx2()):
            console.print("[yellow]ggml is left out:[/] it is not built for AVX2 alone")
            del libraries["ggml"]
    wanted, name = series(args), "formats" if args.formats else "peers"
    if args.isa:  # another tier than this processor's best is another benchmark
        name = f"{name}_{args.isa}"
    points: list[Point] = []
    errors: list[dict[str, Any]] = []
    for threads in args.threads:
        pool = PoolConfig(threads)
        bench = Bench(threads, args.rounds, args.seconds, args.seed, Reads(threads))
        for (method, shape), tokens in wanted.items():
            ceiling, counted = ceilings(method, pool, args.isa)
            workers = set_up(
                libraries, console, threads, shape=shape, method=method, max_tokens=max(tokens)
            )
            pace = Pace(args.longest_call)
            for count in tokens:
                points += measure(
                    bench, workers, SHAPES[shape], method, count, pace, ceiling, counted
                )
            for worker in workers:
                worker.close()
            if points:  # the series takes long: what is measured is kept if it is stopped
                write_receipt(args.json, receipt(name, points=rows(points), errors=errors))
    if not points:
        raise SystemExit("no library could run")
    if not args.no_accuracy:
        for method in dict.fromkeys(method for method, _ in wanted):
            errors += accuracy(libraries, method, min(args.threads), console)
    write_receipt(args.json, receipt(name, points=rows(points), errors=errors))
    show_all(console, rows(points), errors, args.formats, narrow=args.isa == "avx2")


def rows(points: list[Point]) -> list[dict[str, Any]]:
    """The points as a receipt stores them."""
    return [{**asdict(p), "ms": p.ms, "read_bandwidth": p.read_bandwidth} for p in points]


def show_all(
    console: Console,
    points: list[dict[str, Any]],
    errors: list[dict[str, Any]],
    formats: bool = False,
    narrow: bool = False,
) -> None:
    """Print the tables; `formats`: with what only those of every format have; `narrow`: of AVX2."""
    title = f"one call (ours is faster by), {processor()}"
    columns = comparison.FORMAT_COLUMNS if formats else comparison.COLUMNS
    show(console, title, columns, comparison.side_by_side(points))
    console.print("; ".join(comparison.labels(points)))
    if wanted := comparison.verdicts(points, narrow):
        verdicts = comparison.FORMAT_VERDICTS if formats else comparison.VERDICTS
        show(console, "targets", verdicts, wanted)
    if errors:
        title = "error ||y - reference|| / ||reference||, reference in float64"
        show(console, title, ERRORS, errors)
        console.print(f"Ours should be at most {OUR_ERROR:.4f}.")
    console.print(
        "Percentages: of the read bandwidth around each point, and of the peak of our tier's "
        "instruction. Shape C runs without its biases and clamps, which not every library has."
    )


if __name__ == "__main__":
    main()
