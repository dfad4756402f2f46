"""Two source trees in turn on the same problem: is one faster, and by how much?

    python bench/paired.py BEFORE AFTER --methods MXFP4,BF16 --shapes A,B --tokens 1,16,1024
    python bench/paired.py . . --tier avx512_bf16,avx512_vbmi

A tree is a checkout with an environment of its own (`make install` in it). Each runs its own
package through its own `bench/peer/worker.py`, in a process that is stopped (SIGSTOP) while the
other one runs. Both have the same random experts and batches. The trees take turns many times a
point, the first of a round second in the next one, so that neighbours and a changing clock meet
both alike. "gain" is the median over rounds of BEFORE's time over AFTER's in the same round (above
1 AFTER is faster) and its standard error. The same tree twice shows the machine's noise.

Read bandwidths are of the same seconds. Where all threads read less than 1.3 times what one does,
neighbours are busy on the memory: shares of it are high and gains small.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import parse_list, parse_shapes, processor, receipt, write_receipt
from peer.find import Place
from peer.process import WorkerProcess
from problem import Shape, batches_for, random_batches
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.table import format_named

LEAST_ROUNDS = 5
SLICE_SECONDS = 0.1
"""Of one tree in one round: short, since neighbours come and go; one call at least."""
READ_SECONDS = 0.05
QUIET = 1.3
"""All threads read so many times what one does where nobody else is on the memory."""

_WHERE = "import hybrid_moe; print(hybrid_moe.__file__)"


@dataclass(frozen=True)
class Point:
    """One row. Times are medians over all calls, ms; bandwidths GB/s; rates GMAC/s.

    `gains`: BEFORE's time over AFTER's, of each round.
    """

    method: str
    shape: str
    tiers: tuple[str, str]
    threads: int
    tokens: int
    before_ms: float
    after_ms: float
    gains: list[float]
    weight_bandwidth: float
    one_reads: float
    all_read: float
    rate: float
    peak: float
    others: float

    @property
    def gain(self) -> float:
        return statistics.median(self.gains)

    @property
    def error(self) -> float:
        """Standard error of the gain, by the quartiles of the rounds: one odd round changes
        neither. 1.349 standard deviations lie between the quartiles of a normal distribution, and
        its median's error is sqrt(pi / 2) times its mean's."""
        low, high = np.percentile(self.gains, (25, 75))
        return float(1.2533 * (high - low) / 1.349 / len(self.gains) ** 0.5)

    @property
    def quiet(self) -> bool:
        return self.threads == 1 or self.all_read >= QUIET * self.one_reads


def place(tree: Path, tier: str | None) -> Place:
    """How a tree's own worker starts.

    Raises:
        SystemExit: the tree has no environment, or one that would run another tree's package.
    """
    tree = tree.resolve()
    python = tree / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{tree} has no .venv: run `make install` in it")
    found = subprocess.run(
        [python, "-c", _WHERE], cwd=tree / "bench", capture_output=True, text=True, check=True
    ).stdout.strip()
    if tree not in Path(found).resolve().parents:
        raise SystemExit(f"{python} runs {found}, which is not of {tree}")
    return Place(str(python), {"HYBRID_MOE_ISA": tier} if tier else {}, tree / "bench")


class Reads:
    """Read bandwidth with one thread and with all of a point's, in turn."""

    def __init__(self, threads: int) -> None:
        counts = sorted({1, threads})
        self._probes = [ReadProbe(PoolConfig(n)) for n in counts]
        self._seen: list[list[float]] = []

    def measure(self) -> None:
        self._seen.append([probe.measure(READ_SECONDS) for probe in self._probes])

    def take(self) -> tuple[float, float]:
        """Medians (one thread, all threads) of what was measured since the last call, GB/s."""
        medians = [statistics.median(column) for column in zip(*self._seen, strict=True)]
        self._seen = []
        return medians[0], medians[-1]


def measure(
    workers: Sequence[WorkerProcess],
    shape: Shape,
    method: str,
    threads: int,
    tokens: int,
    seconds: float,
    reads: Reads,
    peak: float,
) -> Point:
    """One point: rounds in which each tree runs once."""
    for worker in workers:
        worker.ask("prepare", tokens=tokens, seed=1)
    calls: tuple[list[float], list[float]] = ([], [])
    gains: list[float] = []
    others: list[float] = []
    begin = time.perf_counter()
    while len(gains) < LEAST_ROUNDS or time.perf_counter() - begin < seconds:
        reads.measure()
        medians = [0.0, 0.0]
        for i in (0, 1) if len(gains) % 2 == 0 else (1, 0):
            answer = workers[i].ask("run", seconds=SLICE_SECONDS, least=1)
            calls[i].extend(answer["samples"])
            others.append(answer["others"])
            medians[i] = statistics.median(answer["samples"])
        gains.append(medians[0] / medians[1])
    reads.measure()
    one_reads, all_read = reads.take()
    before, after = (statistics.median(samples) for samples in calls)
    batches = random_batches(shape, tokens, batches_for(tokens), seed=1)
    distinct = statistics.mean(batch.distinct_experts for batch in batches)
    nbytes = distinct * shape.weights_per_expert * format_named(method).bits_per_weight / 8
    return Point(
        method, shape.name, (workers[0].label, workers[1].label), threads, tokens,
        1e3 * before, 1e3 * after, gains, nbytes / after / 1e9, one_reads, all_read,
        shape.macs(tokens) / after / 1e9, peak / 1e9, statistics.median(others),
    )  # fmt: skip


def table(points: Sequence[Point]) -> Table:
    """The points as a rich table."""
    shown = Table(title=f"before and after, in turn, on {processor()}")
    shown.add_column("layer")
    for name in (
        "threads", "tokens", "before, ms", "after", "gain", "rounds", "GB/s",
        "1 thread reads", "all read", "% of read", "% of peak", "others",
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for p in points:
        shown.add_row(
            f"{p.method} {p.shape}", str(p.threads), str(p.tokens),
            f"{p.before_ms:.3f}", f"{p.after_ms:.3f}", f"{p.gain:.3f} ± {p.error:.3f}",
            str(len(p.gains)), f"{p.weight_bandwidth:.1f}", f"{p.one_reads:.1f}",
            f"{p.all_read:.1f}" + ("" if p.quiet else " busy"),
            f"{100 * p.weight_bandwidth / p.all_read:.0f}", f"{100 * p.rate / p.peak:.0f}",
            f"{100 * p.others:.0f} %" if p.others > 0.01 else "",
        )  # fmt: skip
    return shown


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a source tree")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--methods", default="MXFP4,BF16")
    parser.add_argument("--shapes", default="A", help="rows of the shapes table, A to D")
    parser.add_argument("--tokens", default="1,4,16,64,1024")
    parser.add_argument("--threads", default=str(usable_cores()), help="with commas")
    parser.add_argument(
        "--tier", help="ISA tier (HYBRID_MOE_ISA), or BEFORE's,AFTER's; default: each its best"
    )
    parser.add_argument("--seconds", type=float, default=6, help="of each point, both trees")
    parser.add_argument("--json", metavar="FILE", help="write the receipt there")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=170)
    tiers = parse_list(args.tier or "") or [None]
    places = [place(args.before, tiers[0]), place(args.after, tiers[-1])]
    tokens = [int(t) for t in parse_list(args.tokens)]
    points: list[Point] = []
    for count, method, shape in itertools.product(
        map(int, parse_list(args.threads)), parse_list(args.methods), parse_shapes(args.shapes)
    ):
        reads = Reads(count)
        peak = mac_ceiling(method, PoolConfig(count), choose_tier(tiers[-1]))
        workers = [WorkerProcess("ours", place, count) for place in places]
        for worker in workers:
            answer = worker.ask(
                "setup", shape=shape.name, method=method, threads=count, max_tokens=max(tokens)
            )
            if "unavailable" in answer:
                raise SystemExit(f"{worker.name} cannot run this: {answer['unavailable']}")
            worker.label = answer["label"]
        for T in tokens:
            p = measure(workers, shape, method, count, T, args.seconds, reads, peak)
            points.append(p)
            console.log(
                f"{method} {shape.name}, {count} threads, {T} tokens: {p.before_ms:.3f} -> "
                f"{p.after_ms:.3f} ms, gain {p.gain:.3f} ± {p.error:.3f}"
            )
        for worker in workers:
            worker.close()
    console.print(table(points))
    console.print("; ".join(dict.fromkeys(" -> ".join(p.tiers) for p in points)))
    write_receipt(
        args.json, receipt("paired", points=[{**asdict(p), "gain": p.gain} for p in points])
    )


if __name__ == "__main__":
    main()
