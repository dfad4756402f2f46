"""The set of kernels that one format needs on one tier, compiled and loaded once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.dsl.tiles import configure, release
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.jit.sources import source_key
from hybrid_moe.cpu_kernels.kernels import encode, epilogue
from hybrid_moe.cpu_kernels.kernels.encode import Encoding
from hybrid_moe.cpu_kernels.kernels.format_kernels import FORMAT_KERNELS


@dataclass(frozen=True)
class DotKernel:
    """A compiled dot kernel: its address, and how many tokens it may be called with."""

    least: int
    most: int
    address: int


@dataclass(frozen=True)
class KernelSet:
    """Addresses of compiled kernels.

    Attributes:
        direct: dot kernels over packed codes, those for most tokens first.
        tiled: dot kernels over unpacked codes (or packed, without `unpack`), likewise.
        unpack: codes -> weight bytes, or 0 where the format is read as it is packed.
        chunk_group_bytes: bytes of one group of a strip as the tiled kernels read it.
        chunk_groups: groups of a strip that a pass over many tokens keeps in the cache.
        encoding: of the activations.
        direct_limit: an expert with more tokens than this uses the tiled kernels.
        enter, leave: what a thread calls before and after its part of a job, or 0.
    """

    direct: Sequence[DotKernel]
    tiled: Sequence[DotKernel]
    unpack: int
    chunk_group_bytes: int
    chunk_groups: int
    encoding: Encoding
    direct_limit: int
    encode: int
    activate: int
    combine: int
    clear: int
    finish: int
    enter: int
    leave: int


_LARGEST_TILE = 12
"""Tokens beyond which a wider tile gains nothing: a weight load is already shared by 24 dots."""


def tile_sizes(tier: Tier, reserved: int, largest: int = _LARGEST_TILE) -> tuple[int, ...]:
    """Token counts to make kernels for: the largest whose two accumulators each fit beside
    `reserved` registers for weights, activations and constants, then about halves down to 1."""
    fitting = (tier.registers - reserved) // (2 * tier.registers_per_panel)
    sizes = [max(1, min(largest, fitting))]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


def functions_of(format_name: str, tier: Tier) -> list[tuple[str, int, KernelBody]]:
    """(name, arity, body) of every kernel of the format on the tier."""
    kernels = FORMAT_KERNELS[format_name]
    blocks = kernels.tile if tier.tiles else None
    few = blocks.pass_tokens if blocks else _LARGEST_TILE
    sizes = tile_sizes(tier, kernels.reserved_registers, min(few, _LARGEST_TILE))
    functions: list[tuple[str, int, KernelBody]] = [
        ("encode", 6, encode.encode_rows(kernels.encoding)),
        ("activate", 9, epilogue.activate(kernels.encoding)),
        ("combine", 6, epilogue.combine),
        ("clear", 2, epilogue.clear),
        ("finish", 4, epilogue.finish),
    ]
    if blocks is None or not blocks.always:
        functions += [(f"direct{m}", 8, kernels.direct(m)) for m in sizes]
    if blocks is not None:
        functions += [(f"block{m}", 8, body) for m, body in blocks.dots.items()]
        functions += [("enter", 0, configure(blocks.config)), ("leave", 0, release)]
    elif kernels.tiled is not None:
        functions += [(f"tiled{m}", 8, kernels.tiled(m)) for m in sizes]
    unpack = kernels.unpack if blocks is None else blocks.unpack
    if unpack is not None:
        functions += [("unpack", 3, unpack)]
    return functions


def _dot_kernels(at: Mapping[str, int], kind: str) -> list[DotKernel]:
    """The kernels named `kind` and a number of tokens; a block takes fewer tokens too."""
    sizes = sorted((int(n[len(kind) :]) for n in at if n.startswith(kind)), reverse=True)
    return [
        DotKernel(less + 1 if kind == "block" else most, most, at[f"{kind}{most}"])
        for most, less in itertools.pairwise([*sizes, 0])
    ]


@functools.lru_cache(maxsize=64)
def kernel_set(format_name: str, tier: Tier) -> KernelSet:
    """Compile (or fetch from the cache) and load the kernels of a format on a tier."""
    kernels = FORMAT_KERNELS[format_name]
    functions = functions_of(format_name, tier)
    label = f"{format_name.lower()}_{tier.name}"
    own = tier is TIERS.get(tier.name)  # else a name does not tell what it is
    at = compile_functions(
        lambda: build_module(functions, tier, label),
        tier.target,
        [name for name, _, _ in functions],
        label,
        sources=source_key(label) if own else None,
    )
    direct, tiled, blocks = (_dot_kernels(at, kind) for kind in ("direct", "tiled", "block"))
    direct = direct or blocks
    return KernelSet(
        direct=direct,
        tiled=blocks or tiled or direct,
        unpack=at.get("unpack", 0),
        chunk_group_bytes=kernels.chunk_group_bytes,
        chunk_groups=max(1, kernels.chunk_bytes // kernels.chunk_group_bytes),
        encoding=kernels.encoding,
        direct_limit=kernels.tile.pass_tokens if blocks else 2 * direct[0].most,
        encode=at["encode"],
        activate=at["activate"],
        combine=at["combine"],
        clear=at["clear"],
        finish=at["finish"],
        enter=at.get("enter", 0),
        leave=at.get("leave", 0),
    )
