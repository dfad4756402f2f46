"""Is this machine slower at anything than it was? Under two minutes; ratios to the ceilings.

    python bench/quick.py [--strict]

A layer's figures are shares of what the machine could do in the same seconds, so that they can be
compared with stored ones (`docs/results`, same processor) although a shared host is never the same;
fork-join and the start from the object cache are times. Ends with 0 whatever it finds; with
--strict, with 1 if a figure is slower by more than 15 %.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import pool
from harness import DISTURBED, Reads, make_layer
from moe_layer import measure
from problem import SHAPES
from rich.console import Console
from tables import number, show, text

from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SLOWER = 0.85
"""A figure that is less than this part of the stored one is called slower."""

DECODE_TOKENS, PREFILL_TOKENS = 1, 256
LAYERS = (("MXFP4", "A"), ("BF16", "B"))

_START = """
import sys, time
from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
begin = time.perf_counter()
for method in sys.argv[1:]:
    kernel_set(method, choose_tier())
drivers.addresses()
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class Figure:
    """One thing that was measured; `unit` is shown, `higher_is_better` decides what slower is."""

    name: str
    value: float
    unit: str
    higher_is_better: bool


def speed(now: Figure, stored: Figure) -> float:
    """How fast `now` is beside `stored`: 1 the same, below 1 slower."""
    ratio = now.value / stored.value
    return ratio if now.higher_is_better else 1 / ratio


def verdict(now: Figure, stored: Figure | None) -> str:
    """A word for the table."""
    if stored is None:
        return "nothing stored"
    relative = speed(now, stored)
    return "SLOWER" if relative < SLOWER else "faster" if relative > 1 / SLOWER else "same"


def stored_figures(folder: Path, machine: str) -> tuple[str | None, dict[str, Figure]]:
    """Date and figures of the newest stored run on this processor; None where there is none."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        document = json.loads(path.read_text())
        if document["processor"] == machine and "quick" in document["benches"]:
            points = document["benches"]["quick"]["points"]
            return document["date"], {p["name"]: Figure(**p) for p in points}
    return None, {}


def layer_figures(threads: int, seconds: float) -> tuple[list[Figure], float]:
    """Decode as a share of the read bandwidth, prefill as a share of the peak.

    Returns:
        The figures, and the largest share of the processors that others had meanwhile.
    """
    config, reads = PoolConfig(threads), Reads(threads)
    figures = []
    others = 0.0
    for method, name in LAYERS:
        shape = SHAPES[name]
        ceiling = mac_ceiling(method, config)
        layer = make_layer(shape, method, config)
        decode, prefill = (
            measure(layer, shape, tokens, seconds, reads, ceiling, attempts=2)
            for tokens in (DECODE_TOKENS, PREFILL_TOKENS)
        )
        layer.close()
        others = max(others, decode["others"], prefill["others"])
        read = decode["weight_bandwidth"] / decode["read_bandwidth"]
        peak = prefill["rate"] / prefill["rate_ceiling"]
        title = f"{method} {name}, {threads} threads"
        figures += [
            Figure(f"decode, {title}", 100 * read, "% of read bandwidth", True),
            Figure(f"prefill, {title}", 100 * peak, "% of peak", True),
        ]
    return figures, others


def pool_figures(threads: int, samples: int, rounds: int = 3) -> list[Figure]:
    """Microseconds of an empty job that another thread runs: the least median of some rounds,
    since a neighbour only ever adds to it. Nothing with one thread."""
    medians: dict[str, list[float]] = {}
    for _ in range(rounds):
        for p in pool.measure(threads, [pool.tiny_shape(threads)], samples):
            if p.caller == "handed over":
                medians.setdefault(p.state, []).append(p.median_us)
    return [
        Figure(f"fork-join, {state}, {threads} threads", min(values), "us", False)
        for state, values in medians.items()
    ]


def start_figure(rounds: int = 3) -> Figure:
    """Seconds in which a fresh process has its kernels from the object cache."""
    command = [sys.executable, "-c", _START, *(method for method, _ in LAYERS)]
    times = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds + 1)
    ]
    return Figure("kernels from the cache", statistics.median(times[1:]), "s", False)


def now_and_then(figures: Sequence[Figure], stored: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for figure in figures:
        before = stored.get(figure.name)
        rows.append({
            "figure": f"{figure.name}, {figure.unit}",
            "now": f"{figure.value:.3g}",
            "stored": "" if before is None else f"{before.value:.3g}",
            "speed": None if before is None else speed(figure, before),
            "verdict": verdict(figure, before),
        })  # fmt: skip
    return rows


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seconds", type=float, default=1.5, help="of each point of a layer")
    parser.add_argument("--strict", action="store_true", help="end with 1 if a figure is slower")
    args = parser.parse_args()
    layers, others = layer_figures(args.threads, args.seconds)
    figures = [*layers, *pool_figures(args.threads, 300), start_figure()]
    date, stored = stored_figures(RESULTS, processor())
    console = Console(width=120)
    columns = (
        text("figure", "{figure}"),
        text("now", "{now}"),
        text(f"stored {date}" if date else "stored", "{stored}"),
        number("speed", "speed", 2),
        text("verdict", "{verdict}"),
    )
    rows = now_and_then(figures, stored)
    show(console, f"quick check, {processor()}", columns, rows)
    if others > DISTURBED:
        console.print(f"Others had {100 * others:.0f} % of the processors: try again when idle.")
    write_receipt(args.json, receipt("quick", points=[asdict(figure) for figure in figures]))
    return int(args.strict and any(row["verdict"] == "SLOWER" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
