"""Which configuration of each GPU kernel is fastest on this card, beside the heuristic's choice.

    python bench/gpu_tune.py --shapes A,B,C --tokens 1,8,64,1024 --json FILE

For each kernel and shape: the time of every candidate, for kernels with weights the share of the
card's copy bandwidth, and the row that would replace the heuristic's choice, if a candidate is
faster by more than 3 %. Times are of one launch out of 16 in a CUDA graph. Each launch routes
its tokens anew, over experts that take four times the L2 cache, so that weights come from memory;
the median of 20 replays counts.

Needs a GPU. Candidates are compiled first, several at a time.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import parse_list, parse_numbers, parse_shapes, parser
from problem import Shape
from rich.console import Console
from tables import number, share, show, text

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import WeightFormat, format_named
from hybrid_moe.gpu_kernels import down, gate_up
from hybrid_moe.gpu_kernels.combine import combine_launch
from hybrid_moe.gpu_kernels.definition import Launch
from hybrid_moe.gpu_kernels.gemm_config import GemmConfig, gemm_config, token_tile
from hybrid_moe.gpu_kernels.pack_parts import THREADS
from hybrid_moe.gpu_kernels.pack_tokens import (
    PackedTokens,
    empty_packed,
    pack_launches,
    pack_ref,
    takes_one_launch,
)
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.toolchain import availability, has_pdl, launch, prepare
from hybrid_moe.planning.receipt import receipt, write_receipt

Tensor = torch.Tensor

KERNELS = ("pack", "gate_up", "down", "combine")
LAUNCHES = 16
"""In a graph, each with another routing."""
REPLAYS = 20
WORTH = 0.97
"""A candidate below this part of the heuristic's time would replace it."""
COLD = 4
"""Experts take so many times the L2 cache: what a launch reads has been replaced since it was last
read."""
MEMORY = 0.6
"""Part of the free memory that experts may take."""


@dataclass(frozen=True)
class Card:
    """What candidates depend on.

    Attributes:
        name: as the driver gives it.
        shared_bytes: that a block may have.
        l2_bytes: of the second-level cache.
        free_bytes: of memory.
        pdl: programmatic dependent launch.
    """

    name: str
    shared_bytes: int
    l2_bytes: int
    free_bytes: int
    pdl: bool


def this_card(device: torch.device) -> Card:
    """The GPU `device`."""
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    return Card(
        properties.name,
        properties.shared_memory_per_block_optin,
        properties.L2_cache_size,
        free,
        has_pdl(device),
    )


def one_pool(fmt: WeightFormat, shape: Shape) -> SlotLayout:
    """Slots of a machine with one NUMA node."""
    H, I = shape.hidden, shape.intermediate
    pool = ShareLayout(
        range(I // GROUP),
        range(-(-H // STRIP_ROWS)),
        strip_layout(fmt, H),
        strip_layout(fmt, I),
        shape.biased,
    )
    return SlotLayout(fmt, H, I, (pool,))


def slots_needed(shape: Shape, slot_bytes: int, card: Card) -> int:
    """As many as the shape has experts, and more if these would stay in the L2 cache.

    Raises:
        SystemExit: they do not fit the card's memory.
    """
    slots = max(shape.experts, -(-COLD * card.l2_bytes // slot_bytes))
    if slots * slot_bytes > MEMORY * card.free_bytes:
        raise SystemExit(
            f"{slots} experts of shape {shape.name} take {slots * slot_bytes / 1e9:.1f} GB; "
            f"{card.name} has {card.free_bytes / 1e9:.1f} GB free; {MEMORY:.0%} of that may be used"
        )
    return slots


@dataclass(frozen=True)
class Problem:
    """One shape, format and number of tokens on a device.

    Attributes:
        routings: ids, int64 [T, k], for each launch of a graph.
        packed: what `pack` makes of them.
    """

    fmt: WeightFormat
    shape: Shape
    layout: SlotLayout
    memory: Tensor
    x: Tensor
    routings: Sequence[Tensor]
    packed: Sequence[PackedTokens]
    pdl: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[0]

    @property
    def slots(self) -> int:
        """S: every expert has a slot of its own number."""
        return self.memory.shape[0]

    @property
    def slot_of(self) -> Tensor:
        """int32 [S]."""
        return torch.arange(self.slots, dtype=torch.int32, device=self.x.device)

    @property
    def tile(self) -> int:
        """Pairs of a tile."""
        return self.packed[0].tile_rows.shape[1]


def make_problem(
    fmt: WeightFormat, shape: Shape, tokens: int, slots: int, device: torch.device, pdl: bool
) -> Problem:
    """Random weights and tokens. Bytes of weights are at most 0x3F: E8M0 scales, and bf16 values,
    are small and finite."""
    layout = one_pool(fmt, shape)
    random = torch.Generator(device).manual_seed(1)

    def integers(most: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(most, size, generator=random, dtype=torch.uint8, device=device)

    x = torch.randn(tokens, shape.hidden, generator=random, device=device).to(torch.bfloat16)
    routings = [
        torch.rand(tokens, slots, generator=random, device=device).topk(shape.top_k).indices
        for _ in range(LAUNCHES)
    ]
    tile = token_tile(tokens * shape.top_k, slots)
    slot_of = torch.arange(slots, dtype=torch.int32, device=device)
    packed = [pack_ref(x, ids, slot_of, fmt=fmt, slots=slots, tile=tile) for ids in routings]
    memory = integers(0x40, (slots, layout.nbytes))
    return Problem(fmt, shape, layout, memory, x, routings, packed, pdl)


@dataclass(frozen=True)
class Candidate:
    """One way to run a kernel.

    Attributes:
        row: as it would stand in the heuristic.
        launches: of routing i.
    """

    row: str
    launches: Callable[[int], list[Launch]]


def gemm_configs(chosen: GemmConfig, card: Card) -> list[GemmConfig]:
    """The heuristic's choice, then all others that fit the card: other warps, strips of a block,
    groups on their way. What fixes a token's bits, the K ranges, stays."""
    few = chosen.tile < 32
    splits = {-(-chosen.ranges // each) for each in range(1, chosen.ranges + 1)} if few else {0}
    found = [chosen]
    for k_warps, strips, stages, depth in itertools.product(
        sorted(splits), (1, 2, 4, 8), (0,) if few else (2, 4, 8), (2, 4, 8) if few else (2,)
    ):
        try:
            config = GemmConfig(
                chosen.format, chosen.tile, chosen.ranges, strips, k_warps, stages, depth,
                chosen.biases, chosen.pdl,
            )  # fmt: skip
        except ValueError:  # cannot be compiled
            continue
        if config.threads <= 256 and config.shared_bytes <= card.shared_bytes:
            found.append(config)
    return list(dict.fromkeys(found))


def gemm_candidates(kernel: str, problem: Problem, card: Card) -> Iterator[Candidate]:
    """Of `gate_up` or `down`."""
    layout, shape, tile = problem.layout, problem.shape, problem.tile
    first = kernel == "gate_up"
    K, columns = (shape.hidden, shape.intermediate) if first else (shape.intermediate, shape.hidden)
    pairs, device = problem.tokens * shape.top_k, problem.x.device
    table = torch.from_numpy(layout.gate_up_table if first else layout.down_table).to(device)
    dtype = torch.bfloat16 if first else torch.float32
    shared = {
        "memory": problem.memory,
        "table": table,
        "wide": torch.zeros(problem.slots, dtype=torch.int32, device=device),
        "out": torch.empty(pairs, columns, dtype=dtype, device=device),
        "slot_bytes": layout.nbytes,
        "K": K,
        "strips": table.shape[0],
        "row_columns": columns,
        "pairs_per_row": shape.top_k if first else 1,
    }
    h = torch.zeros(pairs, K, dtype=torch.bfloat16, device=device)
    activation = Activation(shape.limit, shape.alpha)
    chosen = gemm_config(problem.fmt.name, K, tile, biases=layout.biases, pdl=problem.pdl)
    for config in gemm_configs(chosen, card):
        definition = (
            gate_up.definition(gate_up.GateUpConfig(config, *activation.parameters))
            if first
            else down.definition(config)
        )

        def launches(i: int, definition: Any = definition, config: Any = config) -> list[Launch]:
            packed = problem.packed[i]
            values = {
                **shared,
                **packed._asdict(),
                "activations": packed.xp if first else h,
            }
            grid = config.grid(table.shape[0], packed.tile_slot.shape[0])
            return [Launch(definition, tuple(values[a.name] for a in definition.arguments), grid)]

        yield Candidate(repr(config), launches)


def pack_candidates(problem: Problem) -> Iterator[Candidate]:
    """One launch and three, what the heuristic takes first."""
    pairs = problem.tokens * problem.shape.top_k
    best = takes_one_launch(pairs)
    for few in (best, not best):
        if few and pairs > THREADS:
            continue

        def launches(i: int, few: bool = few) -> list[Launch]:
            room = empty_packed(problem.x, pairs, problem.slots, problem.tile)
            return pack_launches(
                problem.x, problem.routings[i], problem.slot_of, room,
                fmt=problem.fmt, few=few, pdl=problem.pdl,
            )  # fmt: skip

        yield Candidate("one launch" if few else "three launches", launches)


def combine_candidates(problem: Problem) -> Iterator[Candidate]:
    """Threads of a block, the default first."""
    shape, device = problem.shape, problem.x.device
    weights = torch.full((problem.tokens, shape.top_k), 1 / shape.top_k, device=device)
    rows = [
        torch.zeros(problem.tokens * shape.top_k, shape.hidden, device=device)
        for _ in range(LAUNCHES)
    ]
    cold = torch.zeros(problem.tokens, shape.hidden, device=device)
    for threads in (128, 32, 64, 256):

        def launches(i: int, threads: int = threads) -> list[Launch]:
            return [
                combine_launch(
                    rows[i], problem.routings[i], weights, problem.slot_of, cold,
                    torch.empty_like(problem.x), threads=threads, pdl=problem.pdl,
                )
            ]  # fmt: skip

        yield Candidate(f"threads={threads}", launches)


def candidates(kernel: str, problem: Problem, card: Card) -> list[Candidate]:
    """All ways to run `kernel`, the heuristic's choice first."""
    if kernel == "pack":
        return list(pack_candidates(problem))
    if kernel == "combine":
        return list(combine_candidates(problem))
    return list(gemm_candidates(kernel, problem, card))


def bytes_read(kernel: str, problem: Problem) -> float | None:
    """Bytes of weights that a launch reads, mean over routings: of each expert that occurs once.
    None for kernels without weights."""
    if kernel not in ("gate_up", "down"):
        return None
    pool = problem.layout.shares[0]
    strips = pool.down_offset if kernel == "gate_up" else pool.strip_bytes - pool.down_offset
    experts = [len(ids.unique()) for ids in problem.routings]
    return strips * statistics.mean(experts)


def measure(candidate: Candidate, pdl: bool) -> float:
    """Microseconds of a launch (or of the launches that one `pack` is)."""
    queued = [each for i in range(LAUNCHES) for each in candidate.launches(i)]

    def run() -> None:
        for each in queued:
            launch(*each, pdl=pdl)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # loads the kernels, which a capture must not
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1000 * statistics.median(times) / LAUNCHES


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy of 1 GiB, read and written bytes together."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        begin.record()
        to.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * source.nbytes / statistics.median(times) / 1e9


Point = dict[str, Any]


def verdict(points: Sequence[Point]) -> str:
    """What to do with the times of one kernel's candidates, the heuristic's first."""
    chosen, best = points[0], min(points, key=lambda point: point["us"])
    if best["us"] >= WORTH * chosen["us"]:
        return f"{where(chosen)}: the heuristic's choice stands, {chosen['us']:.1f} us"
    return (
        f"{where(best)}: {best['us']:.1f} us instead of {chosen['us']:.1f} with\n"
        f"    {best['row']}   # {best['card']}"
    )


def where(point: Point) -> str:
    """What was measured."""
    return (
        f"{point['kernel']}, {point['format']}, H = {point['H']}, I = {point['I']}, "
        f"{point['tokens']} tokens (tiles of {point['tile']})"
    )


def tune(kernel: str, problem: Problem, card: Card, bandwidth: float) -> list[Point]:
    """Times of all candidates, the heuristic's choice first."""
    found = candidates(kernel, problem, card)
    definitions = {each.definition: None for c in found for each in c.launches(0)}
    prepare(list(definitions), problem.x.device)
    read = bytes_read(kernel, problem)
    points = []
    for candidate in found:
        us = measure(candidate, problem.pdl)
        points.append(
            {
                "card": card.name,
                "kernel": kernel,
                "format": problem.fmt.name,
                "H": problem.shape.hidden,
                "I": problem.shape.intermediate,
                "tokens": problem.tokens,
                "tile": problem.tile,
                "row": candidate.row,
                "us": us,
                "share": None if read is None else read / us / 1e3 / bandwidth,
            }
        )
    return points


COLUMNS = [
    text("candidate", "{row}"),
    number("us", "us", 1),
    share("% of a copy", "share"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__ or "")
    made.add_argument("--kernels", type=parse_list, default=",".join(KERNELS))
    made.add_argument("--formats", type=parse_list, default="MXFP4", help="MXFP4, BF16")
    made.add_argument("--shapes", type=parse_shapes, default="B", help="A to D")
    made.add_argument("--tokens", type=parse_numbers, default="1,8,64,1024")
    options = made.parse_args(arguments)
    unknown = [name for name in options.kernels if name not in KERNELS]
    if unknown:
        raise SystemExit(f"unknown kernel {unknown[0]}: there are {', '.join(KERNELS)}")
    usable = availability()
    if not usable.usable:
        raise SystemExit(f"nothing to tune: {usable.reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    card = this_card(device)
    bandwidth = copy_bandwidth(device)
    console = Console()
    console.print(f"{card.name}: a copy moves {bandwidth:.0f} GB/s")
    points: list[Point] = []
    for name, shape, tokens in itertools.product(options.formats, options.shapes, options.tokens):
        fmt = format_named(name)
        slots = slots_needed(shape, one_pool(fmt, shape).nbytes, card)
        problem = make_problem(fmt, shape, tokens, slots, device, card.pdl)
        for kernel in options.kernels:
            found = tune(kernel, problem, card, bandwidth)
            show(console, where(found[0]), COLUMNS, sorted(found, key=lambda point: point["us"]))
            console.print(verdict(found))
            points += found
        del problem
        torch.cuda.empty_cache()
    write_receipt(
        options.json,
        receipt("gpu_tune", card=card.name, copy_gb_per_s=round(bandwidth, 1), points=points),
    )


if __name__ == "__main__":
    main()
