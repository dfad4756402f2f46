"""What the benchmarks of our own layers share: a layer with random weights, and its time beside the
read bandwidth of the same seconds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from problem import SHAPES, SOURCES, Batch, Calls, Shape
from weights import Codes, activation_bits, format_of, random_experts

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.tensors import ExpertTensors, Matrix

DISTURBED = 0.05
"""A measurement in which others had this share of all processors is taken again."""

ATTEMPTS = 3

QUIET = 1.3
"""Where nobody else is on the memory, all threads read at least so many times what one reads."""

_READ_SECONDS = 0.075


def parse_list(text: str) -> list[str]:
    """ "A,B" -> ["A", "B"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_numbers(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    return [int(part) for part in parse_list(text)]


def parse_shapes(text: str) -> list[Shape]:
    """Rows of the shapes table by name; raises `SystemExit` with the names that exist."""
    unknown = [name for name in parse_list(text) if name not in SHAPES]
    if unknown:
        raise SystemExit(f"unknown shape {unknown[0]}: there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in parse_list(text)]


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a command that writes a receipt; its help is the text of its file."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", metavar="FILE", help="write the receipt there")
    return made


def layer_parser(doc: str, methods: str, threads: object) -> argparse.ArgumentParser:
    """Of a command whose points are methods x shapes x tokens x threads, all lists with commas."""
    made = parser(doc)
    made.add_argument(
        "--methods",
        type=parse_list,
        default=methods,
        help="of the formats' table, or as weights.py names them",
    )
    made.add_argument("--shapes", type=parse_shapes, default="A", help="A to D")
    made.add_argument("--tokens", type=parse_numbers, default="1,4,16,64,256,1024")
    made.add_argument("--threads", type=parse_numbers, default=str(threads))
    return made


def make_layer(
    shape: Shape,
    method: str,
    pool: PoolConfig,
    isa: str | Tier | None = None,
    plain: bool = False,
) -> ExpertLayer:
    """Our layer with random experts.

    Args:
        plain: without the shape's biases and clamps, as peers can all run it.
    """
    options = shape.biased and not plain
    activation = Activation(shape.limit, shape.alpha) if options else Activation()
    rng = np.random.default_rng(5)
    bias = {
        name: rng.standard_normal(size[0], dtype=np.float32) if options else None
        for name, size in shape.matrices.items()
    }

    def matrix(name: str, source: Codes) -> Matrix:
        return Matrix(**source.planes, bias=bias[name], scale_rows=source.fmt.scale_rows)

    sources = [
        ExpertTensors(**{name: matrix(name, codes) for name, codes in expert.items()})
        for expert in random_experts(shape, method)
    ]
    layer = ExpertLayer(
        format_of(method),
        shape.experts,
        shape.hidden,
        shape.intermediate,
        pool=pool,
        activation=activation,
        activation_bits=activation_bits(method),
        isa=isa,
    )
    layer.allocate(np.ones(shape.experts, bool), biases=options)
    with ThreadPoolExecutor(pool.threads) as workers:
        list(workers.map(lambda e: layer.load(e, sources[e % SOURCES]), range(shape.experts)))
    return layer


def weight_bytes(method: str, shape: Shape, batches: Sequence[Batch]) -> float:
    """Bytes of the experts that a call touches, in the format's own bits; mean of the batches."""
    distinct = statistics.mean(batch.distinct_experts for batch in batches)
    return distinct * shape.weights_per_expert * format_of(method).bits_per_weight / 8


class Reads:
    """Read bandwidth of one thread and of all threads of a point, in turn, GB/s.

    Neighbours on the same memory controllers change the bandwidth by a factor of two within
    minutes, so a speed says little without the ceiling of its own seconds.
    """

    def __init__(self, threads: int) -> None:
        counts = sorted({1, threads})
        self._probes = [ReadProbe(PoolConfig(n)) for n in counts]

    def measure(self) -> tuple[float, float]:
        """(one thread, all of them) now."""
        speeds = [probe.measure(_READ_SECONDS) for probe in self._probes]
        return speeds[0], speeds[-1]


@dataclass(frozen=True)
class Timing:
    """Calls, and what one thread and all threads read (GB/s) just before and just after."""

    calls: Calls
    reads: tuple[float, float]

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.calls.seconds)


def layer_point(
    method: str,
    shape: Shape,
    batches: Sequence[Batch],
    threads: int,
    median: float,
    reads: tuple[float, float],
    peak: float,
) -> dict[str, Any]:
    """A layer's speed beside its ceilings, as receipts and tables have it: ms a call, GB/s, GMAC/s.

    Args:
        median: seconds of a call with one of the batches.
        reads: what one thread and what all of them read around it, GB/s.
        peak: multiply-accumulates per second.
    """
    tokens = len(batches[0].x)
    one, every = reads
    return {
        "method": method,
        "shape": shape.name,
        "tokens": tokens,
        "threads": threads,
        "ms": 1e3 * median,
        "weight_bandwidth": weight_bytes(method, shape, batches) / median / 1e9,
        "read_bandwidth": every,
        "one_thread_reads": one,
        "quiet": every >= QUIET * one if threads > 1 else None,  # one thread cannot tell
        "rate": shape.macs(tokens) / median / 1e9,
        "rate_ceiling": peak / 1e9,
        "tokens_per_s": tokens / median,
    }


def time_beside_reads(
    measure: Callable[[], Calls], reads: Reads, attempts: int = ATTEMPTS
) -> Timing:
    """Time calls between two measurements of the read bandwidth; again while others are busy, and
    then the least disturbed of `attempts`."""
    timings: list[Timing] = []
    while len(timings) < attempts and not any(t.calls.others < DISTURBED for t in timings):
        before = reads.measure()
        calls = measure()
        one, every = (statistics.mean(pair) for pair in zip(before, reads.measure(), strict=True))
        timings.append(Timing(calls, (one, every)))
    return min(timings, key=lambda timing: timing.calls.others)
