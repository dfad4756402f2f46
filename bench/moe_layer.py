"""Speed of one MoE layer on the CPU, beside the ceilings of this machine and these seconds.

    python bench/moe_layer.py --methods MXFP4,BF16 --shapes A --tokens 1,4,16,64,256,1024
    python bench/moe_layer.py --tiers all --threads 1,2 --tokens 1,1024

Points are methods x shapes x tokens x threads x ISA tiers; tiers that this processor lacks are
listed as skipped. Each point is the median call of `ExpertLayer.forward`; every call routes every
token anew, over more experts than any cache holds. What one thread reads and what all of the
point's threads read is measured just before and just after it: memory is "quiet" where all read at
least 1.3 times what one does, else neighbours are on it.
"""

from __future__ import annotations

import itertools
from typing import Any

from harness import (
    ATTEMPTS,
    Reads,
    layer_parser,
    layer_point,
    make_layer,
    parse_list,
    time_beside_reads,
)
from problem import Shape, batches_for, random_batches, time_calls
from rich.console import Console
from tables import MOE_LAYER, OTHERS, show
from weights import format_of

from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling, usable_tiers
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.planning.receipt import processor, receipt, write_receipt


def measure(
    layer: ExpertLayer,
    shape: Shape,
    tokens: int,
    seconds: float,
    reads: Reads,
    peak: float,
    attempts: int = ATTEMPTS,
) -> dict[str, Any]:
    """One point; measured again while others are busy, `attempts` times at most."""
    batches = random_batches(shape, tokens, batches_for(tokens), seed=1)

    def call(index: int) -> None:
        batch = batches[index % len(batches)]
        layer.forward(batch.x, batch.ids, batch.weights)

    timing = time_beside_reads(lambda: time_calls(call, seconds), reads, attempts)
    method, threads = layer.fmt.name, layer.pool.threads
    return {
        **layer_point(method, shape, batches, threads, timing.median, timing.reads, peak),
        "isa": layer.tier.name,
        "fastest_ms": 1e3 * min(timing.calls.seconds),
        "calls": len(timing.calls.seconds),
        "others": timing.calls.others,
    }


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
    parser = layer_parser(__doc__, "MXFP4,BF16", usable_cores())
    parser.add_argument(
        "--tiers", help="ISA tiers with commas, `all`, or `others`: all but the best; default: it"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each point")
    args = parser.parse_args()
    console = Console(width=160)
    tiers, skipped = wanted_tiers(args.tiers)
    for name, missing in skipped.items():
        console.print(f"skipped: {name} needs {missing}")
    points = []
    for threads, tier, method in itertools.product(args.threads, tiers, args.methods):
        pool, reads = PoolConfig(threads), Reads(threads)
        peak = mac_ceiling(format_of(method).name, pool, tier)
        for shape in args.shapes:
            layer = make_layer(shape, method, pool, tier)  # one is in memory at a time
            for tokens in args.tokens:
                p = measure(layer, shape, tokens, args.seconds, reads, peak)
                points.append(p)
                console.log(
                    f"{method} {shape.name}, {tier.name}, {threads} threads, {tokens} tokens: "
                    f"{p['ms']:.2f} ms, {p['weight_bandwidth']:.1f} of {p['read_bandwidth']:.1f} "
                    f"GB/s, {p['rate']:.0f} of {p['rate_ceiling']:.0f} GMAC/s"
                )
            layer.close()
    show(console, f"one MoE layer on {processor()}", [*MOE_LAYER, OTHERS], points)
    console.print(
        "Ceilings: read bandwidth measured around each point with as many threads; peak of the "
        "tier's dot product alone. Others: share of the processors that other processes and guests "
        "had meanwhile."
    )
    write_receipt(args.json, receipt("moe_layer", points=points, skipped=skipped))


if __name__ == "__main__":
    main()
