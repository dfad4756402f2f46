"""Published decode speeds of hybrid systems against the timeline model.

    python bench/published.py         # prints the tables, and writes them into docs/scheduling.md

The systems are those that other projects published with everything that the model asks for: shapes,
bits of a weight, memory channels, GPUs, experts on the GPU. They were listed before anything was
fitted; `LEFT_OUT` has the others and says what is not known of them. Three constants are fitted:
the share of the memory's nominal bandwidth that experts are read with, and what a layer costs
beside its reading, in today's engines and in the first KTransformers. Rows that share an engine, a
model and a machine are one system: to predict it, all of its rows are left out.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_moe.schedule.layer_times import layer_times
from hybrid_moe.schedule.layer_work import (
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
    uniform_met,
)
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.timeline import run_step

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scheduling.md"
GPU_READ_SHARE = 0.75
"""Of a GPU's data sheet; not fitted: what `planning.prediction` assumes."""


@dataclass(frozen=True)
class Shape:
    """A model: layers, of which some have experts; experts of each, and of a token; weights of one;
    weights beside the experts that a token reads."""

    layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    expert: int
    rest: float


V3 = Shape(61, 58, 256, 8, 3 * 7168 * 2048, 16.2e9)
"""DeepSeek-V3 and R1: 671e9 weights, less 58 x 256 experts and the embedding."""
M2 = Shape(62, 62, 256, 8, 3 * 3072 * 1536, 3.4e9)
"""MiniMax-M2.1: 228.7e9, likewise."""
NEXT = Shape(48, 48, 512, 10, 3 * 2048 * 512, 2.4e9)
"""Qwen3-Next-80B-A3B and Qwen3-Coder-Next: 80e9, likewise."""

Q4_K_M, INT4, FP8 = 4.5, 4.25, 8.0
RTX_4090, RTX_5090 = 1008e9, 1792e9


def ddr5(channels: int, mts: int) -> float:
    """Nominal bytes per second: 8 bytes for each transfer of each channel."""
    return channels * mts * 8e6


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        system: rows of one system share an engine, a model and a machine.
        what: how the row differs.
        speed: tokens per second of one request.
        shape, bits: the model, and bits of a weight.
        memory: nominal bytes per second. gpu, gpus: the same of each GPU, and how many.
        hot: share of the experts on GPUs, which are not chosen by use.
        top_k: experts of a token where they are not `shape`'s.
        first: the engine is the first KTransformers, whose layers cost more.
        source: where it is published.
    """

    system: str
    what: str
    speed: float
    shape: Shape
    bits: float
    memory: float
    gpu: float
    source: str
    gpus: int = 1
    hot: float = 0.0
    top_k: int | None = None
    first: bool = False


_V3 = "ktransformers doc/en/DeepseekR1_V3_tutorial.md"
_M2 = "ktransformers doc/en/kt-kernel/MiniMax-M2.1-Tutorial.md"
_NEXT = "ktransformers doc/en/kt-kernel/experts-sched-Tutorial.md"
_XEON, _XEON2 = ddr5(8, 4800), ddr5(16, 4800)
_KT1, _M2_XEON = "KTransformers 0.2, V3 Q4_K_M, 6454S", "kt-kernel, M2.1 FP8, 2x 8488C"
_M2_EPYC, _NEXT_XEON = "kt-kernel, M2.1 FP8, 2x 9355", "kt-kernel, Qwen3-Next FP8, 6454S"
_FASTLLM = "fastllm, R1, 2x 9655"

SYSTEMS: tuple[Published, ...] = (
    Published(_KT1, "1 socket", 8.73, V3, Q4_K_M, _XEON, RTX_4090, _V3, first=True),
    Published(
        _KT1, "1 socket, 6 experts", 10.303, V3, Q4_K_M, _XEON, RTX_4090, _V3, top_k=6, first=True
    ),
    Published(_KT1, "2 sockets", 12.208, V3, Q4_K_M, _XEON2, RTX_4090, _V3, first=True),
    Published(
        _KT1, "2 sockets, 6 experts", 13.69, V3, Q4_K_M, _XEON2, RTX_4090, _V3, top_k=6, first=True
    ),
    Published(
        "KTransformers 0.2, R1 Q4_K_M, 2x 9135", "", 17.3, V3, Q4_K_M, ddr5(24, 6400), RTX_4090,
        "ktransformers issue 797", first=True,
    ),
    Published(_FASTLLM, "INT4", 27, V3, INT4, ddr5(24, 6400), RTX_4090, "fastllm README"),
    Published(_FASTLLM, "FP8", 20, V3, FP8, ddr5(24, 6400), RTX_4090, "fastllm README"),
    Published(_M2_XEON, "1x 4090", 21.8, M2, FP8, _XEON2, RTX_4090, _M2),
    Published(_M2_XEON, "2x 4090", 23.6, M2, FP8, _XEON2, RTX_4090, _M2, gpus=2),
    Published(_M2_EPYC, "1x 5090", 32.1, M2, FP8, ddr5(24, 5600), RTX_5090, _M2),
    Published(_M2_EPYC, "2x 5090", 35.9, M2, FP8, ddr5(24, 5600), RTX_5090, _M2, gpus=2),
    Published(
        "kt-kernel, Qwen3-Coder-Next FP8, 2x 9355", "100 of 512 experts on the GPU", 75.9, NEXT,
        FP8, ddr5(24, 5600), RTX_5090,
        "ktransformers doc/en/kt-kernel/Qwen3-Coder-Next-Tutorial.md", hot=100 / 512,
    ),
    *(
        Published(
            _NEXT_XEON, f"{percent} % on 4x 4090", speed, NEXT, FP8, _XEON, RTX_4090, _NEXT,
            gpus=4, hot=percent / 100,
        )
        for percent, speed in zip(
            range(0, 100, 10),
            (52.96, 56.57, 60.28, 62.08, 66.82, 65.25, 72.80, 76.17, 79.20, 81.06),
            strict=True,
        )
    ),
)  # fmt: skip
"""Experts on the GPU are none where a page does not say; Qwen3-Next's are its column "uniform".
Channels are all that the processors have, at the speed that a page gives (the 6454S's of Qwen3-Next
at their fastest)."""

LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("OSDI 2026 (arXiv 2606.10493), V3, 28 and 21.5 tok/s", "the machine's memory"),
    ("fastllm, R1, 40 tok/s and more", "how many requests"),
    ("kt-kernel, Kimi-K2 and V3, 8x L20, 46 to 88 tok/s", "tokens of each step: 8 to 37 requests"),
    ("kt-kernel, V4-Flash, 5090, 20+ tok/s", "the host"),
    ("kt-kernel, V4-Flash, 8x 5090, 26.5 tok/s", "the host; 8 CPU threads bound it"),
    ("FreeToken, V4-Flash, 5090 and Rome, 24.5 to 26.9 tok/s", "the hit rate of its cache"),
    ("FreeToken and llama.cpp, Qwen3.6-35B, 5070 Ti", "the memory; the hit rate"),
    ("llama.cpp, V4-Flash on an EPYC 9V45, 9.7 tok/s", "nothing: but it has no GPU"),
    ("kt-kernel with patches, V4.1-Flash, 2x 7452, 32.0 tok/s", "experts on the GPU"),
    ("dsv41-flash-offload, dsx, Delta, Strata", "hit rates of their caches; drafts"),
    ("llama.cpp, gpt-oss-120b, 14900K, 17 to 25.6 tok/s", "speed of the memory; the GPU"),
    ("Krasis, Qwen3-Coder-Next, 5080, 14.9 tok/s", "bits of a weight; the hit rate"),
    ("Tutel, gpt-oss-120b, A100", "nothing: but it has no experts on a CPU"),
)
"""Published all the same, and what is not known of each."""


@dataclass(frozen=True)
class Constants:
    """What is fitted.

    Attributes:
        read_share: of the nominal bandwidth of the memory.
        layer: seconds of a layer beside what it reads: launches, hand-over to the CPU and back.
        first_layer: the same of the first KTransformers.
    """

    read_share: float
    layer: float
    first_layer: float


START = Constants(0.5, 200e-6, 500e-6)


def predicted(row: Published, constants: Constants) -> float:
    """Tokens per second by the model."""
    shape, top_k = row.shape, row.top_k or row.shape.top_k
    rates = MachineRates(
        cpu_read=row.memory * constants.read_share,
        gpu_read=row.gpu * GPU_READ_SHARE,
        gpu_flops=1e15,  # one token: nothing is bound by arithmetic
        launch=constants.first_layer if row.first else constants.layer,
    )
    nbytes = shape.expert * row.bits / 8
    expert = ExpertWork(nbytes, nbytes / row.gpus, shape.expert, 1e15, 1e15)
    before = GpuAmount(shape.rest * row.bits / 8 / row.gpus / shape.layers)
    hot = shape.num_experts * row.hot
    split = ExpertSplit(
        hot=uniform_met(hot, shape.num_experts, top_k, 1),
        cpu=uniform_met(shape.num_experts - hot, shape.num_experts, top_k, 1),
    )
    dense = layer_times(LayerWork(0, before), ExpertSplit(), rates)
    sparse = layer_times(LayerWork(0, before, expert=expert), split, rates)
    # nothing is deferred, so layers add up
    return 1 / (
        (shape.layers - shape.moe_layers) * run_step([dense]).seconds
        + shape.moe_layers * run_step([sparse]).seconds
    )


def loss(rows: Sequence[Published], constants: Constants) -> float:
    """Sum over systems of the mean squared logarithm of predicted over published."""
    squares: dict[str, list[float]] = {}
    for row in rows:
        ratio = math.log(predicted(row, constants) / row.speed)
        squares.setdefault(row.system, []).append(ratio * ratio)
    return sum(statistics.fmean(values) for values in squares.values())


def fit(rows: Sequence[Published]) -> Constants:
    """The constants of the smallest loss: steps along each, halved where none helps."""
    best = [START.read_share, START.layer, START.first_layer]
    least, step = loss(rows, Constants(*best)), 0.3
    while step > 1e-3:
        moved = False
        for place in range(len(best)):
            for sign in (1, -1):
                tried = list(best)
                tried[place] *= math.exp(sign * step)
                found = loss(rows, Constants(*tried))
                if found < least:
                    best, least, moved = tried, found, True
        if not moved:
            step /= 2
    return Constants(*best)


@dataclass(frozen=True)
class LeftOut:
    """A row predicted without its system. `error`: predicted over published, less 1."""

    row: Published
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.row.speed - 1


def leave_one_out(rows: Sequence[Published]) -> Iterator[LeftOut]:
    """Every row, predicted by constants that its system did not take part in."""
    for system in dict.fromkeys(row.system for row in rows):
        constants = fit([row for row in rows if row.system != system])
        for row in rows:
            if row.system == system:
                yield LeftOut(row, predicted(row, constants))


HEADINGS = ("system", "row", "nominal GB/s", "published", "predicted", "error", "source")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text() -> str:
    """What the page says between its marks."""
    constants = fit(SYSTEMS)
    found = list(leave_one_out(SYSTEMS))
    rows = [
        [
            one.row.system, one.row.what, f"{one.row.memory / 1e9:.0f}", f"{one.row.speed:g}",
            f"{one.predicted:.1f}", f"{one.error:+.0%}", one.row.source,
        ]
        for one in found
    ]  # fmt: skip
    errors = [abs(one.error) for one in found]
    alike = [replace(row, first=False) for row in SYSTEMS]
    two = [abs(one.error) for one in leave_one_out(alike)]
    by_system: dict[str, list[float]] = {}
    for one in found:
        by_system.setdefault(one.row.system, []).append(abs(one.error))
    means = [statistics.fmean(values) for values in by_system.values()]
    return "\n\n".join(
        [
            f"Fitted to all: {constants.read_share:.2f} of the nominal bandwidth, "
            f"{constants.layer * 1e6:.0f} us for a layer, {constants.first_layer * 1e6:.0f} us in "
            "the first KTransformers. Each row below is predicted by constants that were fitted "
            f"without its system. Errors: median {statistics.median(errors):.0%}, worst "
            f"{max(errors):.0%}; of the {len(means)} systems' means the median is "
            f"{statistics.median(means):.0%}. With one cost of a layer for all engines, two "
            f"constants, the median is {statistics.median(two):.0%} and the worst "
            f"{max(two):.0%}: the first KTransformers had a loop of its own around each layer.",
            _table(HEADINGS, rows),
            "Not predicted, because something is not known:",
            _table(("published", "not known"), LEFT_OUT),
        ]
    )


_MARKED = re.compile(r"(<!-- published -->\n).*?(\n<!-- /published -->)", re.S)


def with_table(page: str) -> str:
    """The page with what is between its marks written anew.

    Raises:
        SystemExit: it has no marks.
    """
    if not _MARKED.search(page):
        raise SystemExit(f"{PAGE} has no lines <!-- published --> and <!-- /published -->")
    return _MARKED.sub(lambda match: match[1] + text() + match[2], page)


def main() -> None:
    """Print, and write."""
    print(text())
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
