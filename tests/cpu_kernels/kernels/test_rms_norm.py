"""Compiled norms: within their roundings of float64, and with the bits of torch's operations."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.kernels.rms_norm import LANES, STYLES, NormStyle
from hybrid_moe.cpu_kernels.row_functions import row_functions
from tests.cpu_kernels.emulation import RUNNABLE

SIZES = (8, 24, 64, 128, 520, 2048, 2880, 8256, 16896)
"""Of a row: whole runs of lines and not, with single vectors left, and three levels of sums."""
EPSILON = 1e-6


def _norm(style: NormStyle, tier: str | None, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """On a tier, or on this machine's."""
    out = torch.empty_like(x)
    epsilon = ctypes.c_float(EPSILON)
    row_functions(RUNNABLE[tier] if tier else None)[style.name](
        x.data_ptr(), w.data_ptr(), out.data_ptr(), *x.shape, ctypes.addressof(epsilon)
    )
    return out


def _case(style: NormStyle, size: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(size)
    x = torch.randn(rows, size, generator=rng) * torch.tensor([[1e-3], [1.0], [300.0]])[:rows]
    w = torch.randn(size, generator=rng)
    return x.bfloat16(), w.float() if style.weight_bytes == 4 else w.bfloat16()


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("name", TIERS)
def test_against_float64(name: str, style: NormStyle) -> None:
    """Roundings to bf16, 2^-8 each: the result's, and h's where that is rounded first. Those of
    float32 add less than 2^-14 (chains of at most size / 32 + 40 of 2^-24 each), and 1 + w one of
    2^-24 that is relative to 1."""
    for size in SIZES:
        x, w = _case(style, size)
        h = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
        exact = (w.double() + style.from_one) * h
        roundings = 1 + style.rounds_first
        bound = exact.abs() * ((1 + 2.0**-8) ** roundings * (1 + 2.0**-14) - 1)
        bound += h.abs() * 2.0**-23 * style.from_one + 2.0**-130
        assert ((_norm(style, name, x, w).double() - exact).abs() <= bound).all(), size


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("name", [name for name in TIERS if name != "portable"])
def test_tiers_agree(name: str, style: NormStyle) -> None:
    for size in SIZES:
        x, w = _case(style, size)
        assert torch.equal(_norm(style, name, x, w), _norm(style, "portable", x, w)), size


@pytest.mark.skipif(LANES != 8, reason="torch sums other lanes on this machine")
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_bits_of_torch(style: NormStyle) -> None:
    """On a processor with AVX2, for which torch's sums are compiled with these lanes."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch sums other lanes on this processor")
    for size in SIZES:
        x, w = _case(style, size, 1)
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPSILON)
        weight = w.float() + style.from_one
        h = h.bfloat16().float() if style.rounds_first else h
        assert torch.equal(_norm(style, None, x, w), (weight * h).bfloat16()), size


def test_nan_and_infinity_stay_in_their_row() -> None:
    style = next(iter(STYLES.values()))
    x, w = _case(style, 64)
    for value in (np.nan, np.inf):
        x[1, 5] = value
        out = _norm(style, None, x, w)
        assert out[1].isnan().any() and out[[0, 2]].isfinite().all()
