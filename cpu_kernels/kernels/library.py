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
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.encode import Encoding
from hybrid_moe.cpu_kernels.kernels.format_kernels import FormatKernels, format_kernels
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS, UNPACK_GROUPS, unpack_from
from hybrid_moe.formats.table import FORMATS


@dataclass(frozen=True)
class Tiling:
    """How the tokens of one expert are cut into tiles, and a dot kernel for each size of a tile.

    Attributes:
        most: tokens of the largest tile.
        unit: every tile but the last has a multiple of so many tokens. Vector kernels take exactly
            their number of tokens, so that tiles are even; a matrix unit's block is whole.
        groups: groups of a strip that several tiles meet in turn.
        unpack: kernel that prepares these groups, or 0.
        kernels: tokens of a tile -> address of its dot kernel.
    """

    most: int
    unit: int
    groups: int
    unpack: int
    kernels: Mapping[int, int]

    def sizes(self, count: int) -> list[int]:
        """Tokens of each tile of `count`, as drivers.phases cuts them."""
        units = -(-count // self.unit)
        tiles = -(-count // self.most)
        ends = [min(count, self.unit * (units * i // tiles)) for i in range(tiles + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class KernelSet:
    """Compiled kernels.

    Attributes:
        direct: tiles over packed codes.
        tiled: tiles for many tokens, over unpacked codes if the format has them.
        tiled_from: an expert with so many tokens in a pass uses `tiled`, one with fewer `direct`.
        encoding: of the activations.
        enter, leave: what a thread calls before and after its part of a job, or 0.
    """

    direct: Tiling
    tiled: Tiling
    tiled_from: int
    encoding: Encoding
    encode: int
    gather: int
    activate: int
    combine: int
    weigh: int
    add: int
    clear: int
    finish: int
    finish_float: int
    deliver: int
    enter: int
    leave: int


def _unpacked_sizes(most: int) -> range:
    """Tokens that tiles over unpacked codes can have."""
    even = Tiling(most, 1, 0, 0, {})
    return range(
        min(min(even.sizes(n)) for n in range(unpack_from(most), 2 * BATCH_TOKENS)), most + 1
    )


def functions_of(
    format_name: str, tier: Tier, activation_bits: int = 16
) -> list[tuple[str, int, KernelBody]]:
    """(name, arity, body) of every kernel of the format on the tier."""
    kernels = format_kernels(FORMATS[format_name], activation_bits)
    blocks = kernels.tile if tier.tiles else None
    registers = tier.registers, tier.registers_per_panel
    most = kernels.most(*registers)
    orders = {tokens: kernels.order(tokens, *registers) for tokens in range(1, most + 1)}
    functions: list[tuple[str, int, KernelBody]] = [
        ("encode", 7, encode.encode_rows(kernels.encoding)),
        ("gather", 4, encode.gather(kernels.encoding)),
        ("activate", 6, epilogue.activate(kernels.encoding)),
        ("combine", 6, epilogue.combine),
        ("weigh", 5, epilogue.weigh),
        ("add", 4, epilogue.add),
        ("clear", 2, epilogue.clear),
        ("finish", 5, epilogue.finish),
        ("finish_float", 5, epilogue.finish_float),
        ("deliver", 6, epilogue.deliver),
    ]
    if blocks is None or blocks.from_tokens > 1:
        functions += [(f"direct{m}", DOT_ARITY, kernels.direct(m, o)) for m, o in orders.items()]
    if blocks is not None:
        functions += [(f"block{m}", DOT_ARITY, body) for m, body in blocks.dots.items()]
        functions += [("enter", 0, configure(blocks.config)), ("leave", 0, release)]
    elif kernels.tiled is not None:
        functions += [
            (f"tiled{m}", DOT_ARITY, kernels.tiled(m, orders[m])) for m in _unpacked_sizes(most)
        ]
    unpack = kernels.unpack if blocks is None else blocks.unpack
    if unpack is not None:
        functions += [("unpack", 4, unpack)]
    return functions


def _named(at: Mapping[str, int], kind: str) -> dict[int, int]:
    """Tokens -> address of the kernels named `kind` and a number."""
    return {int(n[len(kind) :]): at[n] for n in at if n.startswith(kind)}


def _tilings(kernels: FormatKernels, at: Mapping[str, int]) -> tuple[Tiling, Tiling, int]:
    """(direct, tiled, tiled_from) of compiled kernels."""
    direct, tiled, blocks = (_named(at, kind) for kind in ("direct", "tiled", "block"))
    never = 2 * BATCH_TOKENS
    unpack = at.get("unpack", 0)
    groups = UNPACK_GROUPS if unpack else kernels.chunk_groups
    few = Tiling(max(direct, default=0), 1, kernels.chunk_groups, 0, direct)
    if blocks:
        each = {t: blocks[min(m for m in blocks if m >= t)] for t in range(1, max(blocks) + 1)}
        many = Tiling(max(blocks), min(blocks), groups, unpack, each)
        assert kernels.tile is not None
        return (few if direct else many), many, kernels.tile.from_tokens
    if tiled:
        return few, Tiling(few.most, 1, groups, unpack, tiled), unpack_from(few.most)
    return few, few, never


def compile_kernels(
    functions: Sequence[tuple[str, int, KernelBody]], tier: Tier, label: str
) -> Mapping[str, int]:
    """Compile kernels for a tier, or fetch them from the cache, and load them.

    Args:
        functions: (name, arity, body) of each.
        label: tells which kernels these are and on which tier; with the sources it is their key.

    Returns:
        Their addresses by name.
    """
    own = tier is TIERS.get(tier.name)  # else a name does not tell what it is
    return compile_functions(
        lambda: build_module(functions, tier, label),
        tier.target,
        [name for name, _, _ in functions],
        label,
        sources=source_key(label) if own else None,
    )


@functools.lru_cache(maxsize=64)
def kernel_set(format_name: str, tier: Tier, activation_bits: int = 16) -> KernelSet:
    """Compile (or fetch from the cache) and load the kernels of a format on a tier.

    Raises:
        ValueError, NotImplementedError: as `format_kernels`.
    """
    kernels = format_kernels(FORMATS[format_name], activation_bits)
    narrow = "_int8" if activation_bits == 8 else ""
    label = f"{format_name.lower()}{narrow}_{tier.name}"
    at = compile_kernels(functions_of(format_name, tier, activation_bits), tier, label)
    direct, tiled, tiled_from = _tilings(kernels, at)
    return KernelSet(
        direct=direct,
        tiled=tiled,
        tiled_from=tiled_from,
        encoding=kernels.encoding,
        encode=at["encode"],
        gather=at["gather"],
        activate=at["activate"],
        combine=at["combine"],
        weigh=at["weigh"],
        add=at["add"],
        clear=at["clear"],
        finish=at["finish"],
        finish_float=at["finish_float"],
        deliver=at["deliver"],
        enter=at.get("enter", 0),
        leave=at.get("leave", 0),
    )
