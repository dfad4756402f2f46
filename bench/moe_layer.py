"""Speed of one MoE layer on the CPU, beside the ceilings of this machine and these seconds.

    python bench/moe_layer.py --methods MXFP4,BF16 --shapes A --tokens 1,4,16,64,256,1024
    python bench/moe_layer.py --tiers all --threads 1,2 --tokens 1,1024

Points are methods x shapes x tokens x threads x ISA tiers; tiers that this processor lacks are
listed as skipped. Each point is the median call of `ExpertLayer.forward`; every call routes every
token anew, over more experts than any cache holds. The read bandwidth is measured just before and
just after it.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass

from common import (
    make_layer,
    parse_list,
    parse_shapes,
    processor,
    receipt,
    time_beside_bandwidth,
    write_receipt,
)
from disturbance import ATTEMPTS
from problem import Shape, batches_for, random_batches
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling, usable_tiers
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores


@dataclass(frozen=True)
class Point:
    """One row of the table. Bandwidths in GB/s, rates in GMAC/s, `ms` per call."""

    method: str
    shape: str
    tokens: int
    threads: int
    isa: str
    ms: float
    fastest_ms: float
    calls: int
    weight_bandwidth: float
    read_bandwidth: float
    rate: float
    rate_ceiling: float
    tokens_per_s: float
    others: float

    @property
    def read_share(self) -> float:
        return self.weight_bandwidth / self.read_bandwidth

    @property
    def rate_share(self) -> float:
        return self.rate / self.rate_ceiling


def measure(
    layer: ExpertLayer,
    shape: Shape,
    tokens: int,
    seconds: float,
    probe: ReadProbe,
    ceiling: float,
    attempts: int = ATTEMPTS,
) -> Point:
    """One point; measured again while others are busy, `attempts` times at most."""
    batches = random_batches(shape, tokens, batches_for(tokens), seed=1)

    def call(index: int) -> None:
        batch = batches[index % len(batches)]
        layer.forward(batch.x, batch.ids, batch.weights)

    timing = time_beside_bandwidth(call, seconds, probe, attempts)
    distinct = sum(batch.distinct_experts for batch in batches) / len(batches)
    touched = distinct * shape.weights_per_expert * layer.fmt.bits_per_weight / 8
    return Point(
        method=layer.fmt.name,
        shape=shape.name,
        tokens=tokens,
        threads=layer.pool.threads,
        isa=layer.tier.name,
        ms=1e3 * timing.median,
        fastest_ms=1e3 * timing.fastest,
        calls=timing.calls,
        weight_bandwidth=touched / timing.median / 1e9,
        read_bandwidth=timing.read_now,
        rate=shape.macs(tokens) / timing.median / 1e9,
        rate_ceiling=ceiling / 1e9,
        tokens_per_s=tokens / timing.median,
        others=timing.others,
    )


def table(points: list[Point]) -> Table:
    """The points as a rich table."""
    shown = Table(title=f"one MoE layer on {processor()}")
    for name in ("method", "shape", "tier"):
        shown.add_column(name)
    for name in (
        "threads", "tokens", "ms", "GB/s of weights", "read GB/s now", "% of read",
        "GMAC/s", "ceiling", "% of ceiling", "tokens/s", "others",
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for p in points:
        shown.add_row(
            p.method,
            p.shape,
            p.isa,
            str(p.threads),
            str(p.tokens),
            f"{p.ms:.3f}",
            f"{p.weight_bandwidth:.2f}",
            f"{p.read_bandwidth:.1f}",
            f"{100 * p.read_share:.0f}",
            f"{p.rate:.1f}",
            f"{p.rate_ceiling:.0f}",
            f"{100 * p.rate_share:.0f}",
            f"{p.tokens_per_s:.1f}",
            f"{100 * p.others:.0f} %" if p.others > 0.01 else "",
        )
    return shown


@dataclass(frozen=True)
class Series:
    """What to measure: every combination."""

    methods: list[str]
    shapes: list[Shape]
    tokens: list[int]
    threads: list[int]
    tiers: list[Tier]
    seconds: float


def run(series: Series, console: Console) -> list[Point]:
    """All points; one layer is in memory at a time."""
    points = []
    for threads, tier, method in itertools.product(series.threads, series.tiers, series.methods):
        pool = PoolConfig(threads)
        probe = ReadProbe(pool)
        ceiling = mac_ceiling(method, pool, tier)
        for shape in series.shapes:
            layer = make_layer(shape, method, pool, tier)
            for count in series.tokens:
                p = measure(layer, shape, count, series.seconds, probe, ceiling)
                points.append(p)
                console.log(
                    f"{method} {shape.name}, {tier.name}, {threads} threads, {count} tokens: "
                    f"{p.ms:.2f} ms, {p.weight_bandwidth:.1f} of {p.read_bandwidth:.1f} GB/s, "
                    f"{p.rate:.0f} of {p.rate_ceiling:.0f} GMAC/s"
                )
            layer.close()
    return points


def wanted_tiers(text: str | None) -> tuple[list[Tier], dict[str, str]]:
    """What --tiers means: tiers to measure, and what this processor lacks for the others.

    Raises:
        ValueError: no such tier.
    """
    best = choose_tier()
    if text is None:
        return [best], {}
    tiers, skipped = usable_tiers([] if text in ("all", "others") else parse_list(text))
    return [tier for tier in tiers if text != "others" or tier != best], skipped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="MXFP4,BF16")
    parser.add_argument("--shapes", default="A", help="rows of the shapes table, A to D")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--threads", default=str(usable_cores()), help="with commas")
    parser.add_argument(
        "--tiers", help="ISA tiers with commas, `all`, or `others`: all but the best; default: it"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each point")
    parser.add_argument("--json", metavar="FILE", help="write the receipt there")
    args = parser.parse_args()
    console = Console(width=140)
    tiers, skipped = wanted_tiers(args.tiers)
    for name, missing in skipped.items():
        console.print(f"skipped: {name} needs {missing}")
    series = Series(
        parse_list(args.methods),
        parse_shapes(args.shapes),
        [int(t) for t in parse_list(args.tokens)],
        [int(t) for t in parse_list(args.threads)],
        tiers,
        args.seconds,
    )
    points = run(series, console)
    console.print(table(points))
    console.print(
        "Ceilings: read bandwidth measured around each point with as many threads; peak of the "
        "tier's dot product alone. Others: share of the processors that other processes and guests "
        "had meanwhile."
    )
    write_receipt(
        args.json, receipt("moe_layer", points=[asdict(p) for p in points], skipped=skipped)
    )


if __name__ == "__main__":
    main()
