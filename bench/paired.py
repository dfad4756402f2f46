"""Two source trees in turn on the same problem: is one faster, and by how much?

    python bench/paired.py BEFORE AFTER --methods MXFP4,BF16 --shapes A,B --tokens 1,16,1024
    python bench/paired.py . . --tier avx512_bf16,avx512_vbmi

A tree is a checkout with an environment of its own (`make install` in it). Each runs its own
package through its own `bench/peer/worker.py`, in a process that is stopped (SIGSTOP) while the
other one runs. Both have the same random experts and batches. The trees take turns many times a
point, the first of a round second in the next one, so that neighbours and a changing clock meet
both alike; and since a process keeps the pages that it was given, each layer is loaded by several
pairs of processes. "gain" is the median over rounds of BEFORE's time over AFTER's in the same round
(above 1 AFTER is faster) and its standard error. The same tree twice shows the machine's noise.

Shares are AFTER's, of the read bandwidth of the same seconds and of the peak of its instruction.
Memory is "quiet" where all threads read at least 1.3 times what one does, else neighbours are on
it: shares of it are high then, and gains small.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import Reads, layer_parser, layer_point, parse_list
from peer.find import Place
from peer.interface import UnavailableError
from peer.process import WorkerProcess
from problem import Shape, batches_for, random_batches
from rich.console import Console
from tables import OTHERS, PAIRED, show

from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

LEAST_ROUNDS = 3
"""Of each pair of processes, however slow a call is."""
SLICE_SECONDS = 0.1
"""Of one tree in one round: short, since neighbours come and go; one call at least."""

_SEED = 1
_WHERE = "import hybrid_moe; print(hybrid_moe.__file__)"


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


def start(places: Sequence[Place], threads: int, **problem: Any) -> list[WorkerProcess]:
    """A process for each tree, with the layer loaded.

    Raises:
        SystemExit: a tree cannot run it.
    """
    workers = [WorkerProcess("ours", place, threads) for place in places]
    for worker, place in zip(workers, places, strict=True):
        try:
            worker.load(threads=threads, **problem)
        except UnavailableError as reason:
            raise SystemExit(f"{place.bench.parent} cannot run this: {reason}") from None
    return workers


@dataclass
class Rounds:
    """What was measured of one point: seconds of every call of either tree, BEFORE's time over
    AFTER's of each round, (one thread, all threads) read bandwidths, the share of others."""

    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    gains: list[float] = field(default_factory=list)
    reads: list[tuple[float, float]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def add(self, workers: Sequence[WorkerProcess], reads: Reads, seconds: float) -> None:
        """Rounds for about so many seconds."""
        begin = time.perf_counter()
        for count in itertools.count():
            self.reads.append(reads.measure())
            if count >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                return
            medians = [0.0, 0.0]
            for tree in (0, 1) if count % 2 == 0 else (1, 0):
                calls = workers[tree].run(SLICE_SECONDS)
                self.seconds[tree].extend(calls.seconds)
                self.others.append(calls.others)
                medians[tree] = statistics.median(calls.seconds)
            self.gains.append(medians[0] / medians[1])


def standard_error(gains: Sequence[float]) -> float:
    """Of their median, by their quartiles: one odd round changes neither. Of a normal distribution
    1.349 standard deviations lie between the quartiles, and the median's error is sqrt(pi / 2)
    times that of the mean."""
    low, high = np.percentile(gains, (25, 75))
    return float(1.2533 * (high - low) / 1.349 / len(gains) ** 0.5)


def point(
    method: str, shape: Shape, threads: int, tokens: int, rounds: Rounds, peak: float
) -> dict[str, Any]:
    """Row of the table, as the receipt has it; what is not of BEFORE is AFTER's."""
    before, after = (statistics.median(seconds) for seconds in rounds.seconds)
    one, every = (statistics.median(column) for column in zip(*rounds.reads, strict=True))
    batches = random_batches(shape, tokens, batches_for(tokens), _SEED)
    return {
        **layer_point(method, shape, batches, threads, after, (one, every), peak),
        "before_ms": 1e3 * before,
        "gain": statistics.median(rounds.gains),
        "error": standard_error(rounds.gains),
        "gains": rounds.gains,
        "others": statistics.median(rounds.others),
    }


def measure(
    places: Sequence[Place],
    method: str,
    shape: Shape,
    threads: int,
    tokens: Sequence[int],
    pairs: int,
    seconds: float,
    reads: Reads,
) -> tuple[dict[int, Rounds], str]:
    """Rounds of every number of tokens, and the tiers that ran."""
    rounds = {T: Rounds() for T in tokens}
    labels = ""
    for _ in range(pairs):
        workers = start(places, threads, shape=shape.name, method=method, max_tokens=max(tokens))
        labels = " -> ".join(worker.label for worker in workers)
        for T in tokens:
            for worker in workers:
                worker.ask("prepare", tokens=T, seed=_SEED)
            rounds[T].add(workers, reads, seconds / pairs)
        for worker in workers:
            worker.close()
    return rounds, labels


def parse_arguments() -> argparse.Namespace:
    parser = layer_parser(__doc__, "MXFP4,BF16", usable_cores())
    parser.add_argument("before", type=Path, help="a source tree")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--tier", help="ISA tier (HYBRID_MOE_ISA), or BEFORE's,AFTER's; default: each its best"
    )
    parser.add_argument("--seconds", type=float, default=6, help="of each point, both trees")
    parser.add_argument("--pairs", type=int, default=2, help="of processes, one after the other")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=180)
    tiers = parse_list(args.tier or "") or [None]
    places = [place(args.before, tiers[0]), place(args.after, tiers[-1])]
    points: list[dict[str, Any]] = []
    for threads, method, shape in itertools.product(args.threads, args.methods, args.shapes):
        reads = Reads(threads)
        peak = mac_ceiling(method, PoolConfig(threads), choose_tier(tiers[-1]))
        rounds, labels = measure(
            places, method, shape, threads, args.tokens, args.pairs, args.seconds, reads
        )
        layer = [point(method, shape, threads, T, rounds[T], peak) for T in args.tokens]
        show(console, f"{labels}, {processor()}", [*PAIRED, OTHERS], layer)
        points += [{**p, "libraries": labels} for p in layer]
        write_receipt(args.json, receipt("paired", points=points))  # as far as it has come


if __name__ == "__main__":
    main()
