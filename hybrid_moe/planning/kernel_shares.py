"""How near the kernels of a format come to the peak of its instructions.

A peak counts products alone. Beside them a kernel decodes codes and makes factors of stored scales:
with one token for every product, with a prompt once for many. The shares are counted from the
kernels' assembly (bench/decode/counted.py, and the largest tile likewise) for the pipes of a Zen 4
on tier `avx512_vbmi`; other tiers lie within a quarter of them, mostly above.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hybrid_moe.formats.weight_format import WeightFormat

_ORDINARY = 0.85
_ONE_TOKEN: Mapping[str, float] = MappingProxyType(
    {
        "BF16": 0.67,
        "MXFP4": 0.82,
        "NVFP4": 0.56,
        "Q4_1": 0.82,
        "Q5_0": 0.54,
        "Q5_1": 0.51,
        "Q2_K": 0.46,
        "Q3_K": 0.37,
        "Q4_K": 0.60,
        "Q5_K": 0.42,
        "Q6_K": 0.44,
        "IQ4_NL": 0.72,
        "IQ4_XS": 0.59,
    }
)
"""Of the formats that are slower, or have been, than integers with one scale for a group."""
_ZERO_POINTS = 0.73
_E4M3 = 0.35
"""E4M3 codes become bf16 one by one."""
_MANY_TOKENS: Mapping[str, float] = MappingProxyType({"BF16": 1.0, "MXFP4": 1.0, "Q2_K": 0.8})
_ONE_FACTOR, _TWO_FACTORS = 0.94, 0.89


def one_token_share(fmt: WeightFormat) -> float:
    """Of the peak, with one token of an expert: what bounds the stream of weights, if memory does
    not."""
    if fmt.code.name == "e4m3":
        return _E4M3
    if "zero" in fmt.scaling:
        return _ZERO_POINTS
    return _ONE_TOKEN.get(fmt.name, _ORDINARY)


def many_token_share(fmt: WeightFormat) -> float:
    """Of the peak, with many tokens of an expert, where weights are decoded once for all."""
    factors = _TWO_FACTORS if len(fmt.planes) > 2 else _ONE_FACTOR
    return _MANY_TOKENS.get(fmt.name, factors)
