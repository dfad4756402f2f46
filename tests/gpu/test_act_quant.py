"""FP8 activations and weights: every code, DeepSeek's arithmetic in NumPy, the kernels' bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.gpu_kernels import act_quant as act
from hybrid_moe.gpu_kernels import weight_dequant as weight
from tests.gpu.harness import distinct_architectures, simulate

F32, BF16 = torch.float32, torch.bfloat16


def _activations(T: int, H: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of all magnitudes; a token of zeros, and blocks with NaN, with infinity, of tiny values."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=rng)
    x *= torch.exp2(torch.randint(-14, 9, (T, H), generator=rng).float())
    x[0] = 0
    x[1 % T, 5], x[2 % T, 7], x[3 % T] = torch.nan, -torch.inf, 2.0**-40
    return x.to(dtype)


def _expected(x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's act_quant_kernel, block by block: float32 operations of NumPy, codes of
    ml_dtypes."""
    T, H = x.shape
    y, s = np.zeros((T, H), np.uint8), np.zeros((T, -(-H // 128)), np.float32)
    for t in range(T):
        for block in range(s.shape[1]):
            values = x[t, 128 * block : 128 * block + 128].astype(np.float32)
            amax = np.maximum(np.abs(values).max(), np.float32(1e-4))
            scale = amax / np.float32(448)
            if power_of_two and np.isfinite(scale):
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            with np.errstate(invalid="ignore"):
                codes = (values / scale).astype(ml_dtypes.float8_e4m3fn)
            y[t, 128 * block : 128 * block + 128] = codes.view(np.uint8)
            s[t, block] = scale
    return y, s


def _same_codes(found: np.ndarray, expected: np.ndarray) -> bool:
    """NaN has two, of both signs."""
    nan = found & 0x7F == 0x7F
    return bool(((found == expected) | (nan & (expected & 0x7F == 0x7F))).all())


@settings(max_examples=25)
@given(
    T=st.integers(1, 5),
    H=st.sampled_from([8, 128, 264, 320]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([F32, BF16]),
    seed=st.integers(0, 1000),
)
def test_the_reference_is_deepseek_s(
    T: int, H: int, power_of_two: bool, dtype: torch.dtype, seed: int
) -> None:
    x = _activations(T, H, dtype, seed)
    y, s = act.act_quant(x, "ue8m0" if power_of_two else None)
    codes, scales = _expected(x.float().numpy(), power_of_two)
    assert np.array_equal(s.numpy(), scales, equal_nan=True)
    assert _same_codes(y.view(torch.uint8).numpy(), codes)


def test_a_scale_that_is_a_power_of_two_already_stays() -> None:
    for exponent in (-20, 0, 5):
        x = torch.full((1, 128), 448.0 * 2.0**exponent)
        assert act.act_quant(x, "ue8m0")[1].item() == max(2.0**exponent, 2.0**-22)


@pytest.mark.parametrize("H, dtype, fmt, warps", [
    (128, BF16, None, 1), (328, BF16, "ue8m0", 4), (264, F32, None, 1),
])  # fmt: skip
def test_the_kernel_of_activations_has_the_reference_s_bits(
    H: int, dtype: torch.dtype, fmt: str | None, warps: int
) -> None:
    T = 5
    x = _activations(T, H, dtype)
    y, s = act.act_quant_ref(x, fmt)
    kernel = act.definition(
        act.ActQuantConfig(H, "bf16" if dtype == BF16 else "f32", fmt is not None, warps)
    )
    for arch in distinct_architectures(kernel):
        for seed in (None, 1, 2):
            codes, scales = torch.full((T, H), 0xAA, dtype=torch.uint8), torch.full_like(s, -77)
            blocks = -(-s.numel() // (2 * warps))
            report = simulate(kernel, arch, (blocks,), (x, codes, scales, T), seed)
            assert np.array_equal(scales.numpy(), s.numpy(), equal_nan=True)
            assert _same_codes(codes.numpy(), y.view(torch.uint8).numpy())
            if seed is None and H == 128:
                assert all(a.units == a.ideal for a in report.of("x")), str(report)


@pytest.mark.parametrize("H, dtype", [(328, BF16), (136, F32)])
def test_the_kernel_of_rounded_activations_has_the_reference_s_bits(
    H: int, dtype: torch.dtype
) -> None:
    x = _activations(5, H, dtype)
    expected = act.fp8_rounded_ref(x)
    config = act.choose_config(H, dtype, 5, power_of_two=True, values=True)
    kernel = act.definition(config)
    for arch in distinct_architectures(kernel):
        for seed in (None, 1):
            y = torch.full_like(x, -77)
            blocks = -(-5 * -(-H // 128) // (2 * config.warps))
            simulate(kernel, arch, (blocks,), (x, y, None, 5), seed)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_activations_that_go_through_fp8() -> None:
    """The product is exact in bf16 and within half a unit of E4M3's last place: 2^-4 of a value,
    or 2^-10 s below 2^-6 s. Over normal values the error is 2.6 % of their size."""
    torch.manual_seed(0)
    x = torch.randn(64, 2880).to(BF16)
    rounded = act.fp8_rounded(x)
    assert rounded.dtype == BF16 and rounded.shape == x.shape
    y, s = act.act_quant(x, "ue8m0")
    s = s.repeat_interleave(128, -1)[:, :2880]
    assert torch.equal(rounded.float(), y.float() * s)
    error = (rounded.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2.0**-4, s * 2.0**-10)).all()
    assert 0.02 < error.norm() / x.double().norm() < 0.03


# ---- weights


CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_every_code_of_a_weight(dtype: torch.dtype) -> None:
    x, s = CODES.repeat(130, 1), torch.rand(2, 2) + 0.1
    y = weight.weight_dequant(x.view(torch.float8_e4m3fn), s, dtype)
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for row in (0, 129):
        scales = s[row // 128].repeat_interleave(128).numpy()
        exact = torch.from_numpy(values * scales).to(dtype)
        torch.testing.assert_close(y[row], exact, rtol=0, atol=0, equal_nan=True)


def test_weights_with_powers_of_two_as_scales() -> None:
    s = torch.tensor([[0, 127, 254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    x = torch.full((3, 384), 0x38, dtype=torch.uint8)  # 1.0
    y = weight.weight_dequant(x, s, F32)
    assert y[2, ::128].tolist() == [2.0**-127, 1.0, 2.0**127]


@pytest.mark.parametrize("M, N, dtype", [(130, 144, BF16), (3, 260, F32), (2, 129, BF16)])
def test_the_kernel_of_weights_has_the_reference_s_bits(M: int, N: int, dtype: torch.dtype) -> None:
    x = CODES.repeat(-(-M * N // 256))[: M * N].view(M, N)
    s = torch.rand(-(-M // 128), -(-N // 128)) + 0.1
    expected = weight.weight_dequant_ref(x, s, dtype)
    config = weight.choose_config(N, dtype)
    kernel = weight.definition(config)
    for arch in distinct_architectures(kernel):
        for seed in (None, 1):
            y = torch.full((M, N), -77.0, dtype=dtype)
            blocks = -(-M * N // (config.each * weight.THREADS))
            simulate(kernel, arch, (blocks,), (x, s, y, M), seed)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


# ---- arguments


def test_nothing_is_quantised() -> None:
    y, s = act.act_quant(torch.empty(0, 256, dtype=BF16))
    assert y.shape == (0, 256) and s.shape == (0, 2)
    no_codes = torch.empty(0, 256, dtype=torch.uint8)
    assert weight.weight_dequant(no_codes, torch.empty(0, 2)).shape == (0, 256)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="scale_fmt is 'e4m3'"):
        act.act_quant(torch.zeros(1, 128), "e4m3")
    with pytest.raises(TypeError, match="x is"):
        act.act_quant(torch.zeros(1, 128).half())
    with pytest.raises(ValueError, match="x has shape"):
        act.act_quant(torch.zeros(1, 100))
    with pytest.raises(ValueError, match="x must be contiguous"):
        act.act_quant(torch.zeros(128, 8).T)
    codes = torch.zeros(130, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"s has shape \[1, 1\]"):
        weight.weight_dequant(codes, torch.zeros(1, 1))
    with pytest.raises(TypeError, match="s is"):
        weight.weight_dequant(codes, torch.zeros(2, 1, dtype=BF16))
    with pytest.raises(TypeError, match="x is"):
        weight.weight_dequant(codes.int(), torch.zeros(2, 1))
    with pytest.raises(TypeError, match="dtype is"):
        weight.weight_dequant(codes, torch.zeros(2, 1), torch.float16)
    with pytest.raises(ValueError, match="x has shape"):
        weight.weight_dequant(codes[0], torch.zeros(2, 1))
    with pytest.raises(ValueError, match="x must be contiguous"):
        weight.weight_dequant(codes.T, torch.zeros(1, 2))
