"""The forward pass of a layer against the float64 reference, on every tier."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import f32_to_bf16
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import (
    Array,
    Case,
    from_bf16,
    has_portable_bits,
    random_batch,
    to_bf16,
)
from tests.cpu_kernels.emulation import QUICK, RUNNABLE
from tests.reference import assert_within

SHAPES = [(32, 32), (96, 64), (64, 160), (352, 96)]
TOKENS = [0, 1, 2, 3, 7, 33, 130]
TOP_K = 3

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
TierNames = pytest.mark.parametrize("name", TIERS)


@functools.lru_cache(maxsize=64)
def _layer(fmt_name: str, name: str, shape: tuple[int, int]) -> tuple[Case, ExpertLayer]:
    case = Case.random(DENSE_FORMATS[fmt_name], *shape)
    return case, case.layer(QUICK[name])


@functools.lru_cache(maxsize=64)
def _portable_bits(fmt_name: str, shape: tuple[int, int], tokens: int) -> Array:
    case, layer = _layer(fmt_name, "portable", shape)
    return layer.forward(*random_batch(tokens, case.H, case.E, TOP_K))


@TierNames
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@Formats
def test_forward(fmt: WeightFormat, shape: tuple[int, int], name: str) -> None:
    """Within the bound of the reference; and the bits of the portable tier."""
    case, layer = _layer(fmt.name, name, shape)
    for tokens in TOKENS:
        batch = random_batch(tokens, case.H, case.E, TOP_K)
        out = layer.forward(*batch)
        assert out.shape == (tokens, case.H) and out.dtype == np.uint16
        assert_within(from_bf16(out), case.reference(*batch))
        if has_portable_bits(fmt, name):
            assert np.array_equal(out, _portable_bits(fmt.name, shape, tokens))


@pytest.mark.parametrize("pools", [1, 2])
@Formats
def test_sums_that_are_not_rounded(fmt: WeightFormat, pools: int) -> None:
    """Their rounding gives the bits of the rounded output, for one token on many workers (rows by
    pair), for many tokens, in parts, and where nothing is computed; H ends in half a strip."""
    case = Case.random(fmt, 352, 96)
    layer = case.layer(pool=PoolConfig(2, pools))
    for tokens in (0, 1, 5, 130, MAX_TOKENS_PER_JOB + 3):
        batch = random_batch(tokens, case.H, case.E, TOP_K)
        for skip in (None, np.ones(case.E, bool)):
            sums = layer.submit(*batch, skip, rounded=False).wait()
            assert sums.shape == (tokens, case.H) and sums.dtype == np.float32
            assert np.array_equal(f32_to_bf16(sums), layer.forward(*batch, skip))
            assert (np.count_nonzero(sums) > 0) == (skip is None and tokens > 0)


@TierNames
@Formats
@pytest.mark.parametrize(
    "activation",
    [
        Activation(),
        Activation(limit=0.5),
        Activation(limit=7.0, alpha=1.702),
        Activation(alpha=2.0),
    ],
    ids=str,
)
def test_biases_and_activations(fmt: WeightFormat, activation: Activation, name: str) -> None:
    case = Case.random(fmt, 96, 64, bias=True, activation=activation)
    batch = random_batch(9, case.H, case.E, TOP_K, scale=2.0)
    out = case.layer(RUNNABLE[name]).forward(*batch)
    assert_within(from_bf16(out), case.reference(*batch))
    plain = dataclasses.replace(case, activation=Activation())
    if activation != Activation():
        assert not np.array_equal(out, plain.layer(RUNNABLE[name]).forward(*batch))


@Formats
def test_a_bias_may_be_missing_in_some_experts(fmt: WeightFormat) -> None:
    with_bias, without = Case.random(fmt, 32, 32, bias=True), Case.random(fmt, 32, 32)
    mixed = dataclasses.replace(with_bias, experts=[*with_bias.experts[:2], *without.experts[2:]])
    x, ids, weights = random_batch(6, 32, 5, 2)
    out = mixed.layer().forward(x, ids, weights)
    first = np.where(ids < 2, ids, -1)
    rest = np.where(ids < 2, -1, ids)
    expected = (
        with_bias.reference(x, first, weights).value + without.reference(x, rest, weights).value
    )
    bound = with_bias.reference(x, first, weights).bound + without.reference(x, rest, weights).bound
    assert (np.abs(from_bf16(out) - expected) <= bound).all()


# values


@TierNames
@pytest.mark.parametrize("exponent", [-120, -60, 0, 30])
@Formats
def test_magnitudes_of_activations(fmt: WeightFormat, exponent: int, name: str) -> None:
    case = Case.random(fmt, 64, 96)
    batch = random_batch(5, case.H, case.E, TOP_K, scale=2.0**exponent)
    out = case.layer(RUNNABLE[name]).forward(*batch)
    assert_within(from_bf16(out), case.reference(*batch))


@Formats
def test_wide_range_within_a_group(fmt: WeightFormat) -> None:
    """Activations from 2^-40 to 2^10 side by side: errors are relative to the group's maximum."""
    case = Case.random(fmt, 96, 64)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((12, case.H)) * 2.0 ** rng.integers(-40, 11, (12, case.H))
    _, ids, weights = random_batch(12, case.H, case.E, TOP_K)
    batch = (to_bf16(x), ids, weights)
    assert_within(from_bf16(case.layer().forward(*batch)), case.reference(*batch), random=False)


@TierNames
@Formats
def test_zero_activations(fmt: WeightFormat, name: str) -> None:
    case = Case.random(fmt, 64, 32)
    x, ids, weights = random_batch(3, case.H, case.E, TOP_K)
    x[0], x[2] = 0, 0x8000
    out = from_bf16(case.layer(RUNNABLE[name]).forward(x, ids, weights))
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()


@TierNames
@pytest.mark.parametrize(
    ("scales", "exponent"),
    [
        ({"gate": 0, "up": 254}, -8),  # 2^-127 is a subnormal float32
        ({"gate": 0, "up": 254}, -14),
        ({"gate": 0, "up": 254}, -20),
        ({"gate": 0, "up": 127}, 100),
        ({"gate": 254, "up": 0}, -110),
        ({"down": 0}, 40),
        ({"down": 0}, 0),
    ],
    ids=str,
)
def test_extreme_scales(scales: dict[str, int], exponent: int, name: str) -> None:
    """E8M0 0 is 2^-127 and 254 is 2^127; every tier computes the same bits with them."""
    case = Case.random(MXFP4, 64, 64)
    for expert in case.experts:  # magnitudes to 1.5 only: 6 * 2^127 is no float32
        for matrix in (expert.gate, expert.up, expert.down):
            matrix.codes[...] &= 0xBB
    case = case.with_scales(**scales)
    batch = random_batch(7, case.H, case.E, TOP_K, scale=2.0**exponent)
    out = case.layer(RUNNABLE[name]).forward(*batch)
    assert_within(from_bf16(out), case.reference(*batch), random=False)
    assert np.array_equal(out, case.layer(RUNNABLE["portable"]).forward(*batch))


def test_a_scale_of_zero_is_not_zero() -> None:
    """The same test would pass if 2^-127 were taken for 0 and the bound allowed it: it must not."""
    case = Case.random(MXFP4, 64, 64).with_scales(gate=0)
    batch = random_batch(4, case.H, case.E, TOP_K, scale=2.0**100)
    expected = case.reference(*batch)
    assert (np.abs(expected.value) > 4 * expected.bound).any()
    out = from_bf16(case.layer().forward(*batch))
    assert (out != 0).any()


@TierNames
def test_negative_zero_codes(name: str) -> None:
    """Code 8 is -0: a matrix of it gives 0 like a matrix of code 0."""
    case = Case.random(MXFP4, 64, 32)
    for expert in case.experts:
        expert.up.codes[...] = 0x88
    x, ids, weights = random_batch(3, case.H, case.E, TOP_K)
    out = from_bf16(case.layer(RUNNABLE[name]).forward(x, ids, weights))
    assert (out == 0).all()


@TierNames
@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x7F81], ids=hex)
@Formats
def test_nan_and_infinity_stay_in_their_row(
    fmt: WeightFormat, bits: int, tokens: int, name: str
) -> None:
    case, layer = _layer(fmt.name, name, (96, 64))
    x, ids, weights = random_batch(tokens, case.H, case.E, TOP_K)
    clean = layer.forward(x, ids, weights)
    x[1, 40] = bits
    out = layer.forward(x, ids, weights)
    assert not np.isfinite(from_bf16(out[1])).any()
    others = np.arange(tokens) != 1
    assert np.array_equal(out[others], clean[others])


# routing


@pytest.mark.parametrize("bad", [-1, -7, 5, 6, 2**31, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("tokens", [3, 40])
def test_ids_out_of_range_contribute_nothing_and_are_counted(bad: int, tokens: int) -> None:
    case, layer = _layer("MXFP4", "portable", (32, 32))
    x, ids, weights = random_batch(tokens, case.H, case.E, TOP_K)
    ids[1, 0], ids[1, 2], ids[2, 1] = bad, bad, bad
    job = layer.submit(x, ids, weights)
    assert job.ignored == 3
    without = weights.copy()
    without[1, 0] = without[1, 2] = without[2, 1] = 0
    expected = layer.forward(x, np.where(ids == bad, 0, ids), without)
    assert np.array_equal(from_bf16(job.wait()), from_bf16(expected))


@pytest.mark.parametrize("tokens", [2, 40])
def test_no_slots_at_all(tokens: int) -> None:
    case, layer = _layer("MXFP4", "portable", (96, 64))
    x, _, _ = random_batch(tokens, case.H, case.E, TOP_K)
    out = layer.forward(x, np.zeros((tokens, 0), np.int64), np.zeros((tokens, 0), np.float32))
    assert (out == 0).all()


@Formats
def test_an_id_given_twice_counts_twice(fmt: WeightFormat) -> None:
    case, layer = _layer(fmt.name, "portable", (64, 160))
    x, ids, weights = random_batch(4, case.H, case.E, TOP_K)
    ids[0] = ids[0, 0]
    ids[2, 1] = ids[2, 0]
    out = layer.forward(x, ids, weights)
    assert_within(from_bf16(out), case.reference(x, ids, weights))


@Formats
def test_one_expert_takes_every_pair(fmt: WeightFormat) -> None:
    case, layer = _layer(fmt.name, "portable", (32, 32))
    x, ids, weights = random_batch(50, case.H, case.E, TOP_K)
    ids[:] = 2
    out = layer.forward(x, ids, weights)
    assert_within(from_bf16(out), case.reference(x, ids, weights))


@Formats
def test_skipped_experts(fmt: WeightFormat) -> None:
    """They need not be loaded, contribute nothing and are not counted as ignored."""
    case = Case.random(fmt, 96, 64)
    skip = np.array([False, True, False, True, False])
    batch = random_batch(11, case.H, case.E, TOP_K)
    expected = case.reference(*batch, skip=skip)
    for layer in (case.layer(), case.layer(only=[0, 2, 4])):
        job = layer.submit(*batch, skip)
        assert job.ignored == 0
        assert_within(from_bf16(job.wait()), expected)


@pytest.mark.parametrize("tokens", [1, 40])
def test_an_expert_that_is_not_loaded(tokens: int) -> None:
    case = Case.random(MXFP4, 32, 32)
    layer = case.layer(only=[0, 2])
    x, ids, weights = random_batch(tokens, case.H, case.E, 1)
    ids[:] = 0
    good = layer.forward(x, ids, weights)
    ids[-1] = 3
    for _ in range(20):  # a refused job must leave no trace in the ring
        with pytest.raises(RuntimeError, match="expert 3"):
            layer.forward(x, ids, weights)
    ids[-1] = 0
    assert np.array_equal(layer.forward(x, ids, weights), good)


@Formats
def test_an_expert_loaded_again(fmt: WeightFormat) -> None:
    """The later weights count, a bias that they lack is gone."""
    first, second = Case.random(fmt, 96, 64, bias=True), Case.random(fmt, 96, 64, seed=9)
    layer = first.layer()
    batch = random_batch(7, 96, first.E, TOP_K)
    layer.forward(*batch)
    for index, expert in enumerate(second.experts):
        layer.load(index, expert)
    assert np.array_equal(layer.forward(*batch), second.layer().forward(*batch))


# sizes


@pytest.mark.parametrize("E", [1, 3, 7, 65])
@Formats
def test_number_of_experts(fmt: WeightFormat, E: int) -> None:
    case = Case.random(fmt, 32, 64, E=E)
    batch = random_batch(9, case.H, E, min(E, 4))
    out = case.layer().forward(*batch)
    assert_within(from_bf16(out), case.reference(*batch))


@pytest.mark.parametrize("shape", [(256, 256), (288, 352), (1024, 320), (544, 64), (32, 96)])
@Formats
def test_packed_size(fmt: WeightFormat, shape: tuple[int, int]) -> None:
    """Nothing is expanded, but the rows of down are rounded up to strips of 64: by 32 rows of the
    3H of an expert where H % 64 = 32, which is at most 1.02 from H = 544 on."""
    case = Case.random(fmt, *shape, E=3)
    stored = 3 * 3 * fmt.nbytes(*shape)
    layer = case.layer()
    H = shape[0]
    assert layer.nbytes == stored * (1 + (32 / (3 * H) if H % 64 else 0))
    assert layer.nbytes <= 1.02 * stored or H < 544
    assert layer.nbytes == 3 * layer.expert_nbytes(0)


def test_only_resident_experts_take_memory() -> None:
    case = Case.random(MXFP4, 256, 256, E=6)
    assert case.layer(only=[1, 4]).nbytes * 3 == case.layer().nbytes


def test_more_tokens_than_a_job_takes() -> None:
    """The batch is cut, and its bits are those of its parts."""
    case, layer = _layer("MXFP4", "portable", (32, 32))
    x, ids, weights = random_batch(4100, case.H, case.E, 2)
    ids[::7, 0] = -1
    job = layer.submit(x, ids, weights)
    assert job.ignored == len(range(0, 4100, 7))
    out = job.wait()
    assert_within(from_bf16(out), case.reference(x, ids, weights))
    for rows in (slice(2040, 2056), slice(4090, 4100), slice(0, 1)):
        assert np.array_equal(out[rows], layer.forward(x[rows], ids[rows], weights[rows]))


# bad input


def _replace(matrix: str, **changes: object):  # type: ignore[no-untyped-def]
    def change(case: Case):  # type: ignore[no-untyped-def]
        expert = case.experts[0]
        return dataclasses.replace(
            expert, **{matrix: dataclasses.replace(getattr(expert, matrix), **changes)}
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace("gate", codes=np.zeros((64, 15), np.uint8)), "shape"),
        (_replace("down", codes=np.zeros((64, 16), np.uint8)), "shape"),
        (_replace("up", codes=np.zeros((64, 16), np.int64)), "uint8"),
        (_replace("up", scales=None), "scales"),
        (_replace("up", scales=np.zeros((64, 2), np.uint8)), "scales"),
        (_replace("gate", scales=np.full((64, 1), 255, np.uint8)), "255"),
        (_replace("gate", bias=np.zeros(3, np.float32)), "bias"),
    ],
)
def test_load_refuses(change, message: str) -> None:  # type: ignore[no-untyped-def]
    case = Case.random(MXFP4, 32, 64)
    layer = case.layer(only=[1])
    layer = ExpertLayer(MXFP4, 5, 32, 64, pool=PoolConfig(1))
    layer.allocate(np.ones(5, bool))
    with pytest.raises(CheckpointError, match=message):
        layer.load(0, change(case))
    assert not layer.loaded.any()


@pytest.mark.parametrize("expert", [-1, 5, 3])
def test_load_of_an_expert_without_memory(expert: int) -> None:
    case = Case.random(MXFP4, 32, 32)
    with pytest.raises(IndexError, match=str(expert)):
        case.layer(only=[0, 1]).load(expert, case.experts[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 32, 32), "num_experts"), ((4, 48, 32), "hidden"), ((4, 32, 0), "intermediate")],
)
def test_sizes_are_checked(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLayer(MXFP4, *sizes, pool=PoolConfig(1))


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", np.zeros((2, 32), np.float32), TypeError, "uint16"),
        ("x", np.zeros((2, 64), np.uint16), ValueError, "hidden"),
        ("x", np.zeros(32, np.uint16), ValueError, "dimensions"),
        ("ids", np.zeros((2, 3), np.int32), TypeError, "int64"),
        ("ids", np.zeros((2, 2), np.int64), ValueError, "top-k"),
        ("weights", np.zeros((2, 3)), TypeError, "float32"),
        ("weights", np.zeros((1, 3), np.float32), ValueError, "top-k"),
        ("skip", np.zeros(4, bool), ValueError, "skip"),
        ("skip", np.zeros(5, np.uint8), ValueError, "skip"),
    ],
)
def test_forward_refuses(argument: str, value: Array, error: type, message: str) -> None:
    case, layer = _layer("MXFP4", "portable", (32, 32))
    x, ids, weights = random_batch(2, case.H, case.E, TOP_K)
    arguments = {"x": x, "ids": ids, "weights": weights, argument: value}
    with pytest.raises(error, match=message):
        layer.forward(**arguments)


def test_states() -> None:
    case = Case.random(MXFP4, 32, 32)
    batch = random_batch(2, case.H, case.E, TOP_K)
    layer = case.layer(only=[])
    with pytest.raises(RuntimeError, match="no expert"):
        layer.forward(*batch)
    with pytest.raises(RuntimeError, match="already"):
        layer.allocate(np.ones(5, bool))
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.forward(*batch)
    other = ExpertLayer(MXFP4, 5, 32, 32, pool=PoolConfig(1))
    with pytest.raises(ValueError, match="resident"):
        other.allocate(np.ones(4, bool))
    with pytest.raises(RuntimeError, match="no expert"):
        other.forward(*batch)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["limit", "alpha"])
def test_activation_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Activation(**{name: value})


def test_inputs_may_have_any_strides_and_change_after_submit() -> None:
    case, layer = _layer("MXFP4", "portable", (96, 64))
    x, ids, weights = random_batch(6, case.H, case.E, TOP_K)
    expected = layer.forward(x, ids, weights)
    wide = np.zeros((6, 2 * case.H), np.uint16)
    wide[:, ::2] = x
    strided = (wide[:, ::2], np.asfortranarray(ids), np.asfortranarray(weights))
    assert np.array_equal(layer.forward(*strided), expected)
    job = layer.submit(x, ids, weights)
    x[:], ids[:], weights[:] = 0x7FC0, 99, np.nan
    assert np.array_equal(job.wait(), expected)


def test_bf16_extremes_do_not_differ_between_formats_of_input() -> None:
    """BF16 activations reach BF16 weights unchanged: one-hot inputs read single weights."""
    case = Case.random(BF16, 64, 32, E=1)
    expert = case.experts[0]
    x = np.zeros((64, 64), np.uint16)
    np.fill_diagonal(x, 0x3F80)
    ids, weights = np.zeros((64, 1), np.int64), np.ones((64, 1), np.float32)
    out = case.layer().forward(x, ids, weights)
    assert_within(from_bf16(out), case.reference(x, ids, weights), random=False)
    assert expert.down.codes.shape == (64, 32)
