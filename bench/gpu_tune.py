"""Which configuration of each GPU kernel is fastest on this card, beside the heuristic's choice.

    python -m bench.gpu_tune [--models Qwen3-30B] [--formats MXFP4] [--tokens 1,8,64,1024]

For each kernel, model and number of tokens: the time of every candidate as a share of the kernel's
ceiling, and the row that would replace the heuristic's choice, if one is faster by more than 3 %.
Times are of one launch of a CUDA graph in which each launch meets other tokens and, while there are
few, other experts, so that weights come from memory (`gpu_check/clock.py`, `workload.py`).

Needs a GPU, and no more Python packages than `gpu_check`. Candidates are compiled first, several at
a time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_check.clock import device, time_us
from bench.gpu_check.kernels import Layer, share_of_ceiling
from bench.gpu_check.points import Points
from bench.gpu_check.workload import MODELS, Batch, Model, random_batches
from hybrid_moe.gpu_kernels import down, gate_up
from hybrid_moe.gpu_kernels.combine import combine_launch
from hybrid_moe.gpu_kernels.definition import KernelDefinition, Launch
from hybrid_moe.gpu_kernels.gemm_config import GemmConfig, gemm_config, token_tile
from hybrid_moe.gpu_kernels.pack_parts import THREADS
from hybrid_moe.gpu_kernels.pack_tokens import (
    PackedTokens,
    empty_packed,
    pack_launches,
    pack_ref,
    takes_one_launch,
)
from hybrid_moe.gpu_kernels.toolchain import availability, has_pdl, launch, prepare

Tensor = torch.Tensor
Point = dict[str, Any]

KERNELS = ("pack", "gate_up", "down", "combine")
WORTH = 0.97
"""A candidate below this part of the heuristic's time would replace it."""


@dataclass(frozen=True)
class Card:
    """What candidates depend on.

    Attributes:
        name: as the driver gives it.
        shared_bytes: that a block may have.
        pdl: programmatic dependent launch.
    """

    name: str
    shared_bytes: int
    pdl: bool


def this_card(where: torch.device) -> Card:
    """The GPU `where`."""
    found = torch.cuda.get_device_properties(where)
    return Card(found.name, found.shared_memory_per_block_optin, has_pdl(where))


@dataclass(frozen=True)
class Problem:
    """A layer, batches for it, and what `pack` makes of each."""

    layer: Layer
    batches: Sequence[Batch]
    packed: Sequence[PackedTokens]

    @staticmethod
    def random(layer: Layer, tokens: int) -> Problem:
        model, batches = layer.model, random_batches(layer.model, tokens, device())
        tile = token_tile(tokens * model.top_k, model.experts)
        fmt = layer.layout.formats.gate_up
        packs = functools.partial(pack_ref, fmt=fmt, slots=model.experts, tile=tile)
        return Problem(layer, batches, [packs(b.x, b.ids, layer.slot_of) for b in batches])

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.batches[0].x)

    @property
    def tile(self) -> int:
        """Pairs of a tile."""
        return self.packed[0].tile_rows.shape[1]


@dataclass(frozen=True)
class Candidate:
    """One way to run a kernel.

    Attributes:
        row: as it would stand in the heuristic.
        launches: for batch i.
    """

    row: str
    launches: Callable[[int], list[Launch]]


def gemm_configs(chosen: GemmConfig, card: Card) -> list[GemmConfig]:
    """The heuristic's choice, then all others that fit the card: other warps, strips of a block,
    groups on their way. What fixes a token's bits, the K ranges, stays."""
    few = not chosen.staged
    splits = {-(-chosen.ranges // each) for each in range(1, chosen.ranges + 1)} if few else {0}
    found = [chosen]
    for k_warps, strips, stages, depth in itertools.product(
        sorted(splits), (1, 2, 4, 8), (0,) if few else (2, 4, 8), (2, 4, 6, 8) if few else (2,)
    ):
        try:
            config = replace(chosen, k_warps=k_warps, strips=strips, stages=stages, depth=depth)
        except ValueError:  # cannot be compiled
            continue
        if config.threads <= 256 and config.shared_bytes <= card.shared_bytes:
            found.append(config)
    return list(dict.fromkeys(found))


def _gemm_candidates(kernel: str, problem: Problem, card: Card) -> Iterator[Candidate]:
    layer, model, layout = problem.layer, problem.layer.model, problem.layer.layout
    first = kernel == "gate_up"
    K, columns = layout.hidden, layout.intermediate
    if not first:
        K, columns = columns, K
    pairs, table = problem.tokens * model.top_k, layer.tables[0 if first else 1]
    shared = {
        "memory": layer.memory,
        "table": table,
        "wide": layer.wide,
        "out": problem.batches[0].x.new_empty(
            (pairs, columns), dtype=torch.bfloat16 if first else torch.float32
        ),
        "slot_bytes": layout.nbytes,
        "K": K,
        "strips": len(table),
        "row_columns": columns,
        "pairs_per_row": model.top_k if first else 1,
    }
    h = problem.batches[0].x.new_zeros(pairs, K)
    fmt = layout.formats.gate_up if first else layout.formats.down
    chosen = gemm_config(fmt.name, K, problem.tile, biases=layout.biases, pdl=card.pdl)

    def definition(config: GemmConfig) -> KernelDefinition:
        if first:
            places = gate_up.places_of(layout.formats.down)
            return gate_up.definition(
                gate_up.GateUpConfig(config, *model.activation.parameters, places)
            )
        return down.definition(config)

    def launches(config: GemmConfig, compiled: KernelDefinition, i: int) -> list[Launch]:
        packed = problem.packed[i]
        values = {**shared, **packed._asdict(), "activations": packed.xp if first else h}
        grid = config.grid(len(table), len(packed.tile_slot))
        return [Launch(compiled, tuple(values[a.name] for a in compiled.arguments), grid)]

    for config in gemm_configs(chosen, card):
        yield Candidate(repr(config), functools.partial(launches, config, definition(config)))


def _pack_candidates(problem: Problem, card: Card) -> Iterator[Candidate]:
    layer, pairs = problem.layer, problem.batches[0].ids.numel()

    def launches(few: bool, i: int) -> list[Launch]:
        batch = problem.batches[i]
        room = empty_packed(batch.x, pairs, layer.model.experts, problem.tile)
        fmt = layer.layout.formats.gate_up
        return pack_launches(
            batch.x, batch.ids, layer.slot_of, room, fmt=fmt, few=few, pdl=card.pdl
        )

    best = takes_one_launch(pairs)
    for few in (best, not best):
        if not few or pairs <= THREADS:
            row = "one launch" if few else "three launches"
            yield Candidate(row, functools.partial(launches, few))


def _combine_candidates(problem: Problem, card: Card) -> Iterator[Candidate]:
    layer, some = problem.layer, problem.batches[0]
    rows = [some.weights.new_zeros(some.ids.numel(), layer.layout.hidden) for _ in problem.batches]
    cold = torch.zeros_like(some.x, dtype=torch.float32)

    def launches(threads: int, i: int) -> list[Launch]:
        batch = problem.batches[i]
        return [
            combine_launch(
                rows[i], batch.ids, batch.weights, layer.slot_of, cold, torch.empty_like(batch.x),
                threads=threads, pdl=card.pdl,
            )
        ]  # fmt: skip

    for threads in (128, 32, 64, 256):
        yield Candidate(f"threads={threads}", functools.partial(launches, threads))


def candidates(kernel: str, problem: Problem, card: Card) -> list[Candidate]:
    """All ways to run `kernel`, the heuristic's choice first."""
    if kernel == "pack":
        return list(_pack_candidates(problem, card))
    if kernel == "combine":
        return list(_combine_candidates(problem, card))
    return list(_gemm_candidates(kernel, problem, card))


def where(point: Point) -> str:
    """What was measured."""
    return (
        f"{point['kernel']}, {point['model']} in {point['format']}, {point['tokens']} tokens "
        f"(tiles of {point['tile']})"
    )


def verdict(points: Sequence[Point]) -> str:
    """What the times of one kernel's candidates say, the heuristic's first."""
    chosen, best = points[0], min(points, key=lambda point: point["us"])
    if best["us"] >= WORTH * chosen["us"]:
        return f"{where(chosen)}: the heuristic's choice stands, {chosen['us']:.1f} us"
    return (
        f"{where(best)}: {best['us']:.1f} us instead of {chosen['us']:.1f} with\n"
        f"    {best['row']}   # {best['card']}"
    )


def tune(kernel: str, problem: Problem, card: Card) -> list[Point]:
    """Times of all candidates, the heuristic's choice first."""
    layer, found = problem.layer, candidates(kernel, problem, card)
    definitions = {each.definition: None for c in found for each in c.launches(0)}
    prepare(list(definitions), device())
    works = [layer.work(batch)[kernel] for batch in problem.batches]
    nbytes, flops = (sum(column) / len(works) for column in zip(*works, strict=True))
    points = []
    for candidate in found:
        queued = [candidate.launches(i) for i in range(len(problem.batches))]

        def call(launches: list[Launch]) -> None:
            for each in launches:
                launch(*each, pdl=card.pdl)

        us = time_us([functools.partial(call, launches) for launches in queued])
        ceiling, share = share_of_ceiling(us, nbytes, flops)
        points.append(
            {
                "card": card.name,
                "kernel": kernel,
                "model": layer.model.name,
                "format": layer.layout.formats.name,
                "tokens": problem.tokens,
                "tile": problem.tile,
                "row": candidate.row,
                "us": us,
                "ceiling": ceiling,
                "share": share,
            }
        )
    return points


def _named(names: str, known: dict[str, Any], what: str) -> list[Any]:
    """Of a list with commas. Raises SystemExit with the names that exist."""
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise SystemExit(f"unknown {what} {name}: there are {', '.join(known)}")
    return [known[name] for name in asked]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--models", default="Qwen3-30B", help=", ".join(m.name for m in MODELS))
    parser.add_argument("--formats", default="MXFP4", help="MXFP4, BF16")
    parser.add_argument("--tokens", default="1,8,64,1024")
    parser.add_argument("--points", help="write JSON lines there")
    args = parser.parse_args(arguments)
    kernels = _named(args.kernels, {name: name for name in KERNELS}, "kernel")
    models: list[Model] = _named(args.models, {model.name: model for model in MODELS}, "model")
    formats = _named(args.formats, {"MXFP4": "MXFP4", "BF16": "BF16"}, "format")
    tokens = [int(count) for count in args.tokens.split(",")]
    usable = availability()
    if not usable.usable:
        raise SystemExit(f"nothing to tune: {usable.reason}")
    card, points = this_card(device()), Points(args.points) if args.points else None
    print(card.name)
    for model, fmt in itertools.product(models, formats):
        layer = Layer.random(model, fmt)
        for count, kernel in itertools.product(tokens, kernels):
            found = tune(kernel, Problem.random(layer, count), card)
            print(verdict(found))
            for point in sorted(found, key=lambda point: point["us"]):
                print(f"    {point['us']:9.1f} us  {point['share'] or 0:4.0%}  {point['row']}")
                if points:
                    points.add("gpu_tune", **point)
        del layer


if __name__ == "__main__":
    main()
