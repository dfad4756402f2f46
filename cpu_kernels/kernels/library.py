"""The set of kernels that one format needs on one tier, compiled and loaded once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.kernels import encode, epilogue
from hybrid_moe.cpu_kernels.kernels.encode import Encoding
from hybrid_moe.cpu_kernels.kernels.formats import FORMAT_KERNELS


@dataclass(frozen=True)
class KernelSet:
    """Addresses of compiled kernels.

    Attributes:
        direct: tokens per call -> dot kernel over packed codes.
        tiled: tokens per call -> dot kernel over unpacked codes (or packed, without `unpack`).
        unpack: codes -> weight bytes, or 0 where the format is read as it is packed.
        chunk_group_bytes: bytes of one group of a strip as the tiled kernels read it.
        encoding: of the activations.
        direct_limit: an expert with more tokens than this uses the tiled kernels.
    """

    direct: Mapping[int, int]
    tiled: Mapping[int, int]
    unpack: int
    chunk_group_bytes: int
    encoding: Encoding
    direct_limit: int
    encode: int
    activate: int
    combine: int
    clear: int
    finish: int


_LARGEST_TILE = 12
"""Tokens beyond which a wider tile gains nothing: a weight load is already shared by 24 dots."""


def tile_sizes(tier: Tier, reserved: int) -> tuple[int, ...]:
    """Token counts to make kernels for: the largest whose two accumulators each fit beside
    `reserved` registers for weights, activations and constants, then about halves down to 1."""
    fitting = (tier.registers - reserved) // (2 * tier.registers_per_panel)
    sizes = [max(1, min(_LARGEST_TILE, fitting))]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


def functions_of(format_name: str, tier: Tier) -> list[tuple[str, int, KernelBody]]:
    """(name, arity, body) of every kernel of the format on the tier."""
    kernels = FORMAT_KERNELS[format_name]
    sizes = tile_sizes(tier, kernels.reserved_registers)
    functions: list[tuple[str, int, KernelBody]] = [
        ("encode", 6, encode.encode_rows(kernels.encoding)),
        ("activate", 9, epilogue.activate(kernels.encoding)),
        ("combine", 6, epilogue.combine),
        ("clear", 2, epilogue.clear),
        ("finish", 4, epilogue.finish),
    ]
    functions += [(f"direct{m}", 7, kernels.direct(m)) for m in sizes]
    if kernels.tiled is not None:
        functions += [(f"tiled{m}", 7, kernels.tiled(m)) for m in sizes]
    if kernels.unpack is not None:
        functions += [("unpack", 3, kernels.unpack)]
    return functions


@functools.lru_cache(maxsize=64)
def kernel_set(format_name: str, tier: Tier) -> KernelSet:
    """Compile (or fetch from the cache) and load the kernels of a format on a tier."""
    kernels = FORMAT_KERNELS[format_name]
    functions = functions_of(format_name, tier)
    label = f"{format_name.lower()}_{tier.name}"
    text = build_module(functions, tier, label)
    at = compile_functions(text, tier.target, [name for name, _, _ in functions], label)
    direct = {int(n[6:]): a for n, a in at.items() if n.startswith("direct")}
    tiled = {int(n[5:]): a for n, a in at.items() if n.startswith("tiled")}
    return KernelSet(
        direct=direct,
        tiled=tiled or direct,
        unpack=at.get("unpack", 0),
        chunk_group_bytes=kernels.chunk_group_bytes,
        encoding=kernels.encoding,
        direct_limit=2 * max(direct),
        encode=at["encode"],
        activate=at["activate"],
        combine=at["combine"],
        clear=at["clear"],
        finish=at["finish"],
    )
