"""Speed of one MoE layer on the CPU, beside the ceilings of this machine and these seconds.

    python bench/moe_layer.py --methods MXFP4,BF16 --shapes A --tokens 1,4,16,64,256,1024

Each point is the median call of `ExpertLayer.forward`; every call routes every token anew, over
more experts than any cache holds. The read bandwidth is measured just before and just after it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from ceilings import mac_ceiling
from common import (
    make_layer,
    parse_list,
    parse_shapes,
    processor,
    receipt,
    time_beside_bandwidth,
    write_receipt,
)
from problem import Shape, batches_for, random_batches
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.bandwidth import ReadProbe
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
) -> Point:
    """One point."""
    batches = random_batches(shape, tokens, batches_for(tokens), seed=1)

    def call(index: int) -> None:
        batch = batches[index % len(batches)]
        layer.forward(batch.x, batch.ids, batch.weights)

    timing = time_beside_bandwidth(call, seconds, probe)
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
    for name in ("method", "shape"):
        shown.add_column(name)
    for name in (
        "tokens", "ms", "GB/s of weights", "read GB/s now", "% of read",
        "GMAC/s", "ceiling", "% of ceiling", "tokens/s", "others",
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for p in points:
        shown.add_row(
            p.method,
            p.shape,
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


def run(
    methods: list[str],
    shapes: list[Shape],
    tokens: list[int],
    threads: int,
    tier: Tier,
    seconds: float,
    console: Console,
) -> list[Point]:
    """All points; one layer is in memory at a time."""
    pool = PoolConfig(threads)
    probe = ReadProbe(threads)
    points = []
    for method in methods:
        ceiling = mac_ceiling(method, threads, tier)
        for shape in shapes:
            layer = make_layer(shape, method, pool, tier)
            for count in tokens:
                points.append(measure(layer, shape, count, seconds, probe, ceiling))
                p = points[-1]
                console.log(
                    f"{method} {shape.name}, {count} tokens: {p.ms:.2f} ms, "
                    f"{p.weight_bandwidth:.1f} of {p.read_bandwidth:.1f} GB/s, "
                    f"{p.rate:.0f} of {p.rate_ceiling:.0f} GMAC/s"
                )
            layer.close()
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="MXFP4,BF16")
    parser.add_argument("--shapes", default="A", help="rows of the shapes table, A to D")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", help="an ISA tier; the best one that runs here by default")
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each point")
    parser.add_argument("--json", metavar="FILE", help="write the receipt there")
    args = parser.parse_args()
    console = Console(width=120)
    points = run(
        parse_list(args.methods),
        parse_shapes(args.shapes),
        [int(t) for t in parse_list(args.tokens)],
        args.threads,
        choose_tier(args.isa),
        args.seconds,
        console,
    )
    console.print(table(points))
    console.print(
        f"{args.threads} threads, ISA tier {points[0].isa}. Ceilings: read bandwidth measured "
        "around each point with as many threads; peak of the tier's dot product alone. "
        "Others: share of the processors that other processes and guests had meanwhile."
    )
    write_receipt(args.json, receipt("moe_layer", [asdict(p) for p in points]))


if __name__ == "__main__":
    main()
