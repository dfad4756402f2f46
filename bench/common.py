"""What the benchmarks share: our layer with random weights, medians, ceilings, receipts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from disturbance import ATTEMPTS, DISTURBED, OtherLoad
from problem import SHAPES, SOURCES, Codes, Shape, random_experts

from hybrid_moe.cpu_kernels.activation import Activation
from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.table import format_named
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

__all__ = [
    "Timing",
    "make_layer",
    "parse_list",
    "parse_shapes",
    "processor",
    "receipt",
    "time_beside_bandwidth",
    "time_calls",
    "write_receipt",
]


def parse_list(text: str) -> list[str]:
    """ "A,B" -> ["A", "B"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_shapes(text: str) -> list[Shape]:
    """Rows of the shapes table by name; raises `SystemExit` with the names that exist."""
    unknown = [name for name in parse_list(text) if name not in SHAPES]
    if unknown:
        raise SystemExit(f"unknown shape {unknown[0]}: there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in parse_list(text)]


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
        return Matrix(source.codes, source.scales, bias[name])

    sources = [
        ExpertTensors(**{name: matrix(name, codes) for name, codes in expert.items()})
        for expert in random_experts(shape, method)
    ]
    layer = ExpertLayer(
        format_named(method),
        shape.experts,
        shape.hidden,
        shape.intermediate,
        pool=pool,
        activation=activation,
        isa=isa,
    )
    layer.allocate(np.ones(shape.experts, bool))
    with ThreadPoolExecutor(pool.threads) as workers:
        list(workers.map(lambda e: layer.load(e, sources[e % SOURCES]), range(shape.experts)))
    return layer


def time_calls(call: Callable[[int], object], seconds: float, least: int = 3) -> list[float]:
    """Seconds of each call(0), call(1), ... until `seconds` have passed; one more goes first."""
    call(0)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call(len(samples) + 1)
        samples.append(time.perf_counter() - start)
    return samples


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and the read bandwidth (GB/s) just before and just after.

    `others` is the share of all cores that other processes and other guests had meanwhile.
    """

    median: float
    fastest: float
    calls: int
    read_before: float
    read_after: float
    others: float

    @property
    def read_now(self) -> float:
        """Read bandwidth of the same seconds, GB/s."""
        return (self.read_before + self.read_after) / 2


def time_beside_bandwidth(
    call: Callable[[int], object], seconds: float, probe: ReadProbe, attempts: int = ATTEMPTS
) -> Timing:
    """Time calls between two measurements of the read bandwidth.

    Neighbours on the same memory controllers change the bandwidth by a factor of two within
    minutes, so a speed says little without the ceiling of its own seconds. A point in which others
    were busy is measured again, and the least disturbed of at most `attempts` is returned.
    """
    timings = []
    for _ in range(attempts):
        before = probe.measure(0.15)
        others = OtherLoad()
        samples = time_calls(call, seconds)
        share = others.share()
        after = probe.measure(0.15)
        median = statistics.median(samples)
        timings.append(Timing(median, min(samples), len(samples), before, after, share))
        if share < DISTURBED:
            break
    return min(timings, key=lambda timing: timing.others)
