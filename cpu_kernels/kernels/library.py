"""The set of kernels that one format needs on one tier, compiled and loaded once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.kernels import dot, encode, epilogue


@dataclass(frozen=True)
class KernelSet:
    """Addresses of compiled kernels.

    Attributes:
        direct: tokens per call -> dot kernel over packed codes.
        tiled: tokens per call -> dot kernel over unpacked codes (or packed, without `unpack`).
        unpack: codes -> weight bytes, or 0 where the format is read as it is packed.
        unpacked_group_bytes: bytes of one unpacked group of a strip.
        direct_limit: an expert with more tokens than this uses the tiled kernels.
    """

    direct: Mapping[int, int]
    tiled: Mapping[int, int]
    unpack: int
    unpacked_group_bytes: int
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
    sizes = tile_sizes(tier, reserved=8 if format_name == "BF16" else 4)
    functions: list[tuple[str, int, KernelBody]] = [
        ("encode", 6, encode.encode_rows(format_name)),
        ("activate", 9, epilogue.activate(format_name)),
        ("combine", 6, epilogue.combine),
        ("clear", 2, epilogue.clear),
        ("finish", 4, epilogue.finish),
    ]
    if format_name == "BF16":
        functions += [(f"direct{m}", 7, dot.bf16_dot(m)) for m in sizes]
    else:
        functions += [(f"direct{m}", 7, dot.mxfp4_dot(m, unpacked=False)) for m in sizes]
        functions += [(f"tiled{m}", 7, dot.mxfp4_dot(m, unpacked=True)) for m in sizes]
        functions += [("unpack", 3, dot.mxfp4_unpack)]
    return functions


@functools.lru_cache(maxsize=64)
def kernel_set(format_name: str, tier: Tier) -> KernelSet:
    """Compile (or fetch from the cache) and load the kernels of a format on a tier."""
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
        unpacked_group_bytes=dot.MXFP4_UNPACKED_GROUP_BYTES,
        direct_limit=2 * max(direct),
        encode=at["encode"],
        activate=at["activate"],
        combine=at["combine"],
        clear=at["clear"],
        finish=at["finish"],
    )
