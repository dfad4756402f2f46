"""Compiled quantizers have the bits of those in NumPy, which say what is meant."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.loaders import quantize
from hybrid_moe.loaders.quantize_loops import ENCODERS

K = 512


def weights(scale_type: str) -> np.ndarray:
    """Normal and with outliers, tiny to subnormal, zeros of both signs, ties, large: [10, K]."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((10, K)).astype(np.float32)
    w[1] = rng.standard_t(1.5, K)
    w[2] *= np.float32(1e-38)
    w[3] = np.where(rng.random(K) < 0.5, 0.0, -0.0)
    w[4] = rng.integers(-16, 17, K) / 2  # halves of a step of 1
    w[5] *= np.float32(1e-6)  # whose steps are subnormal in fp16, or zero
    w[6] = rng.choice([6.0, 7.0, -7.999, 1.75], K)  # where MXFP4's second scale wins
    w[7, : K // 2] = 0
    w[8] *= np.float32(1e30 if scale_type != "fp16" else 1e4)
    w[9] = np.float32(2.0**-149) * rng.integers(-9, 9, K)
    return w


@pytest.mark.parametrize("name", ENCODERS)
def test_bits_are_those_of_the_format(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.scale is not None
    w = weights(fmt.scale.name)
    for given in (w, w[::2], np.asfortranarray(w)):
        codes, scales = ENCODERS[name](given)
        expected, expected_scales = fmt.encode(given)
        assert (codes.dtype, scales.dtype) == (fmt.code_dtype, fmt.scale.dtype)
        assert np.array_equal(codes, expected)
        assert scales.tobytes() == np.ascontiguousarray(expected_scales).tobytes()


@pytest.mark.parametrize("name", ["MXFP4", "INT4_G32_BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_refused(name: str, value: float) -> None:
    w = np.zeros((2, K), np.float32)
    w[1, 40] = value
    with pytest.raises(ValueError, match=f"NaN or infinite, which {name} cannot hold"):
        ENCODERS[name](w)


def test_every_slow_quantizer_is_compiled() -> None:
    """4-bit codes are searched for; those of 8 bits are rounded, which NumPy does as fast."""
    searched = {m.made.name for m in METHODS.values() if m.made and m.made.bits == 4}
    assert searched <= set(ENCODERS)


def test_large_matrices_take_the_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.random.default_rng(6).standard_normal((300, K)).astype(np.float32)
    small = quantize.encode(FORMATS["MXFP4"], raw)
    used: list[int] = []
    loop = ENCODERS["MXFP4"]
    monkeypatch.setattr(quantize, "COMPILED_FROM", raw.size)
    monkeypatch.setattr(
        "hybrid_moe.loaders.quantize_loops.ENCODERS",
        {"MXFP4": lambda w: (used.append(len(w)), loop(w))[1]},
    )
    large = quantize.encode(FORMATS["MXFP4"], raw)
    assert sum(used) == len(raw)
    for left, right in zip(small, large, strict=True):
        assert np.array_equal(left, right)
