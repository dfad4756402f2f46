"""What a short run of the tests leaves out, as `tests/isa.py` says, is there twice."""

from __future__ import annotations

import re

from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.kernels.library import functions_of
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from tests.isa import repeats


def _text(fmt: str, tier: Tier) -> str:
    """IR of one kernel of each kind; those for other numbers of tokens have the same ops."""
    functions = functions_of(fmt, tier)
    one_of_each = [f for f in functions if not re.fullmatch(r"(direct|tiled)[2-5]", f[0])]
    return build_module(one_of_each, tier, "same")


def test_formats_whose_kernels_are_those_of_the_tier_below() -> None:
    left_out = [
        (fmt, name) for fmt in DENSE_FORMATS for name in TIERS if repeats(FORMATS[fmt], name)
    ]
    assert ("BF16", "avx512_vnni") in left_out and ("INT8", "avx512_bf16") in left_out
    for fmt, name in left_out:
        below = TIERS[name].extends
        assert below is not None
        assert _text(fmt, TIERS[name]) == _text(fmt, below), (fmt, name)


def test_others_differ() -> None:
    assert not repeats(FORMATS["BF16"], "avx512_bf16") and not repeats(FORMATS["INT8"], "avx2_vnni")
    assert _text("BF16", TIERS["avx512_bf16"]) != _text("BF16", TIERS["avx512_vnni"])
    assert _text("INT8", TIERS["avx2_vnni"]) != _text("INT8", TIERS["avx2"])
