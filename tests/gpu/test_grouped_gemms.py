"""`gate_up` and `down` in the simulator: values, bits, what they leave alone, what they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.float8 import FP8
from hybrid_moe.formats.mx import MXFP4, MXFP8
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.table import FORMATS as ALL
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels import down, gate_up
from hybrid_moe.gpu_kernels.definition import ARCHITECTURES
from hybrid_moe.gpu_kernels.gemm_config import TOKEN_TILES, GemmConfig, gemm_config
from hybrid_moe.gpu_kernels.weight_codes.objects import FOLDED_SCALES
from tests.cpu_kernels.cases import from_bf16, to_bf16
from tests.gpu.gemm_cases import (
    BF16_NAN,
    FP32_ROUNDOFF,
    Case,
    check_both,
    expected_h,
    expected_y,
    random_case,
    run_down,
    run_gate_up,
    weights_and_parts,
)
from tests.gpu.harness import distinct_architectures
from tests.gpu.slots import pack_slot

FORMATS = (MXFP4, BF16)
H, I = 544, 608
"""Two K ranges each, of odd numbers of groups; half a strip at the end of down; blocks of two and
four strips that are not full."""


@pytest.mark.parametrize(
    ("fmt", "tile"),
    [
        *((MXFP4, tile) for tile in TOKEN_TILES),
        (BF16, 8),
        pytest.param(BF16, 16, marks=pytest.mark.full),
        pytest.param(BF16, 32, marks=pytest.mark.full),
        (BF16, 64),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tokens_bits_depend_on_its_shape_alone(fmt: WeightFormat, tile: int) -> None:
    """Neither on the tile, which chooses the way through K, nor on what else is in the batch."""
    case = random_case(fmt, H, I, outliers=tile == 32)
    h, y = check_both(case, tile)
    if tile != 8:
        other_h, _ = run_gate_up(case, 8)
        other_y, _ = run_down(case, h, 8)
        assert np.array_equal(h, other_h)
        assert np.array_equal(y.view(np.uint32), other_y.view(np.uint32))
        return
    alone = dataclasses.replace(case, slot_of_pair=np.full_like(case.slot_of_pair, -1))
    pair = case.hot[-1]
    alone.slot_of_pair[pair] = case.slot_of_pair[pair]
    assert np.array_equal(run_gate_up(alone, 8)[0][pair], h[pair])
    assert np.array_equal(run_down(alone, h, 8)[0][pair], y[pair])


Q4_K_M = LayerFormats(ALL["Q4_K"], ALL["Q6_K"])
NVFP4_FP8 = LayerFormats(ALL["NVFP4"], ALL["FP8"])
OFTEN = ("MXFP8", "INT4_G128_FP16_Z1", "Q2_K")
"""With the two pairs and the rows of `test_weights_are_exact`: every code, every scaling and every
kind of field. `-m full` has all rows."""


def every_row(rows: Iterable[str]) -> list[Any]:
    """All new rows, those in `rows` in every run."""
    new = {name: fmt for name, fmt in ALL.items() if fmt not in FORMATS}
    others = pytest.mark.full
    return [
        pytest.param(fmt, id=name, marks=() if name in rows else others)
        for name, fmt in new.items()
    ]


def small_case(formats: WeightFormat | LayerFormats, **how: Any) -> Case:
    """Of odd numbers of groups, half a strip at the end of down, blocks that end early."""
    K, I = (3 * f.k_multiple if f.k_multiple < 256 else 256 for f in layer_formats(formats))
    if I >= 256:
        return random_case(formats, K, I, tokens=3, parts=(1,), slots=2, **how)
    return random_case(formats, K, I, tokens=5, slots=2, **how)


@pytest.mark.parametrize(
    "formats", [*every_row(OFTEN), Q4_K_M, NVFP4_FP8], ids=lambda formats: formats.name
)
def test_every_format(formats: WeightFormat | LayerFormats) -> None:
    """Both ways through K have the same bits, within the bound of float64. Of two formats each
    kernel has its own, and h the order of the second."""
    case = small_case(formats)
    h, y = check_both(case, 8)
    other_h, _ = run_gate_up(case, 64)
    other_y, _ = run_down(case, h, 64)
    assert np.array_equal(h, other_h)
    assert np.array_equal(y.view(np.uint32), other_y.view(np.uint32))


@pytest.mark.full
@pytest.mark.parametrize("tile", TOKEN_TILES)
@pytest.mark.parametrize("formats", every_row(()))
def test_every_format_in_long_rows(formats: WeightFormat, tile: int) -> None:
    """Several blocks in each of two K ranges."""
    K = 768 if formats.k_multiple > 32 else 544
    check_both(random_case(formats, 96 if K == 544 else 256, K, tokens=7), tile)


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "parts", "tokens"),
    [(32, 32, (1,), 9), (96, 160, (1, 1), 1), (160, 96, (1, 1, 1), 13), (480, 448, (2, 1), 3)],
)
def test_ragged_shapes(
    hidden: int, intermediate: int, parts: tuple[int, ...], tokens: int, tile: int
) -> None:
    """Fewer groups than are loaded ahead, half a strip, pools without strips; no biases, silu."""
    case = random_case(
        MXFP4,
        hidden,
        intermediate,
        parts=parts,
        tokens=tokens,
        k=3,
        bias=False,
        activation=Activation(),
    )
    check_both(case, tile)


def test_one_expert_has_all_tokens_or_none() -> None:
    case = random_case(MXFP4, 96, 64, bias=False, activation=Activation(), tokens=12)
    full = dataclasses.replace(case, slot_of_pair=np.full(24, 2))
    full.x[:] = random_case(MXFP4, 96, 64, tokens=12).x[0]
    check_both(full, 8)
    nobody = dataclasses.replace(case, slot_of_pair=np.full(24, -1))
    h, report = run_gate_up(nobody, 8)
    assert (h == BF16_NAN).all() and report.reads["memory"].bytes == 0
    y, report = run_down(nobody, h, 8)
    assert np.isnan(y).all() and report.reads["memory"].bytes == 0


@pytest.mark.parametrize("fmt", every_row(("NVFP4", "INT8", "INT8_G128_FLOAT32", "Q3_K")))
def test_weights_are_exact(fmt: WeightFormat) -> None:
    """Each token has one input that is 1, so that y is a column of the weights. One product with a
    factor is rounded, as dequantizing is. A weight with an offset is a product and a sum."""
    K = fmt.k_multiple if fmt.k_multiple > 32 else 96
    layer = LayerFormats(BF16, fmt)
    case = random_case(layer, 32, K, tokens=K, k=1, slots=1, parts=(1,), bias=False)
    case = dataclasses.replace(case, slot_of_pair=np.zeros(K, np.int64))
    matrix = case.slots.experts[0].down
    y, _ = run_down(case, to_bf16(np.eye(K)), 64)
    expected = matrix.dequantize(fmt).T
    if fmt.scaling in ("fp16, min", "q4_k", "q2_k"):
        _, parts = weights_and_parts(fmt, matrix)
        assert (np.abs(y.astype(np.float64) - expected) <= 2 * FP32_ROUNDOFF * parts.T).all()
    else:
        assert np.array_equal(y, expected)


def test_codes_that_are_not_a_number() -> None:
    """E4M3 has two, which make NaN of what their row gives to every token, and of nothing else."""
    case = random_case(LayerFormats(BF16, FP8), 96, 64, tokens=4, k=1, slots=1, parts=(1,))
    case = dataclasses.replace(case, slot_of_pair=np.zeros(4, np.int64))
    expert = case.slots.experts[0]
    expert.down.codes[17, 33], expert.down.codes[70, 2] = 0x7F, 0xFF
    pack_slot(case.slots.layout, case.slots.memory[0], expert)
    y, _ = run_down(case, to_bf16(np.random.default_rng(0).standard_normal((4, 64))), 8)
    expected = np.zeros_like(y, np.bool_)
    expected[:, [17, 70]] = True
    assert np.array_equal(np.isnan(y), expected)


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=lambda fmt: fmt.name)
def test_scales_are_exact(fmt: WeightFormat, wide: bool, tile: int) -> None:
    """Each row has codes in one group alone, and inputs that bring the products back near 1: all
    sums are exact. Scales that cannot be folded need the float32 way, which takes all."""
    least, most = FOLDED_SCALES[fmt.name]
    scales = np.array([0, 1, 2, least, 63, 126, 127, most, most + 1, 190, 253, 254])
    scales = scales if wide else scales[(scales >= least) & (scales <= most)]
    case = random_case(fmt, 96, I, slots=1, tokens=6, k=1, bias=True, wide=wide)
    rng = np.random.default_rng(0)
    groups = I // 32
    scale_of = rng.choice(scales, groups)
    scale_of[: len(scales)] = scales
    matrix = case.slots.experts[0].down
    codes = np.zeros((96, groups, 4 * fmt.bits), np.uint8)
    own = np.arange(96) % groups
    # of E4M3 seven bits for its largest values, without NaN, so that sums are short integers
    values = rng.integers(0, 256, (96, 4 * fmt.bits))
    codes[np.arange(96), own] = values if fmt is MXFP4 else values & 0x80 | 0x38 | values & 0x0F
    matrix.codes[:] = codes.reshape(96, -1)
    matrix.scales[:] = scale_of  # type: ignore[index]
    matrix.bias[:] = 0  # type: ignore[index]
    pack_slot(case.slots.layout, case.slots.memory[0], case.slots.experts[0])
    case = dataclasses.replace(case, slot_of_pair=np.zeros(6, np.int64))
    whole = rng.integers(-100, 101, (6, groups, 32))
    h = to_bf16(np.ldexp(whole, (127 - scale_of)[None, :, None] // 2).reshape(6, I))
    y, _ = run_down(case, h, tile)
    assert np.array_equal(y, expected_y(case, h).value), "a sum is not exact"


@pytest.mark.parametrize("tile", [8, 64])
def test_what_is_read(tile: int) -> None:
    """Weights: whole sectors, each once a tile, and nothing else; no bank conflict anywhere."""
    case = random_case(MXFP4, 480, 448, bias=False, activation=Activation(), tokens=1, k=3)
    case = dataclasses.replace(case, slot_of_pair=np.array([0, 2, -1]))
    h, gate_up_report = run_gate_up(case, tile)
    _, down_report = run_down(case, h, tile)
    read = 0
    for report in (gate_up_report, down_report):
        assert report.bank_conflicts() == []
        loads = report.of("memory")
        assert {load.size for load in loads} == {4, 16}
        for load in loads:
            assert load.units == load.ideal, f"sectors are read in part: {load}"
        read += report.reads["memory"].bytes
    if tile == 8:
        assert read <= 1.02 * 2 * case.slots.layout.nbytes


def check_schedules(fmt: WeightFormat, tile: int, architectures: tuple[str, ...], way: str) -> None:
    """Random schedules of blocks and warps give the bits of sm_80 in lockstep."""
    case = random_case(fmt, H, 96, tokens=5)
    usual, _ = run_gate_up(case, tile)
    expected_h(case).check(from_bf16(usual[case.hot]))
    kernel = gate_up.choose(case.slots.layout, case.activation, tile)
    for arch in distinct_architectures(kernel, architectures) if "gate_up" in way else ():
        for seed in (1, 2, 3):
            h, _ = run_gate_up(case, tile, arch, seed)
            assert np.array_equal(h, usual), (arch, seed)
    case = random_case(fmt, 160, I, tokens=5)
    h = to_bf16(np.random.default_rng(1).standard_normal((10, I)))
    y, _ = run_down(case, h, tile)
    expected_y(case, h).check(y[case.hot].astype(np.float64))
    kernel = down.choose(case.slots.layout, tile)
    for arch in distinct_architectures(kernel, architectures) if "down" in way else ():
        for seed in (1, 2, 3):
            found, _ = run_down(case, h, tile, arch, seed)
            assert np.array_equal(found.view(np.uint32), y.view(np.uint32)), (arch, seed)


@pytest.mark.parametrize(("tile", "way"), [(8, "gate_up"), (64, "down")])
def test_schedules(tile: int, way: str) -> None:
    """One kernel of each way through K, as the compiler writes it before and from sm_100 on."""
    check_schedules(MXFP4, tile, ("sm_80", "sm_100"), way)


@pytest.mark.full
@pytest.mark.parametrize("tile", TOKEN_TILES)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_architecture(fmt: WeightFormat, tile: int) -> None:
    check_schedules(fmt, tile, ARCHITECTURES, "gate_up, down")


@pytest.mark.parametrize(
    "other",
    [
        gemm_config("MXFP4", I, 8, biases=True, pdl=True),
        # what very long inputs take: several ranges in a row of a warp, and stages for tiles of 16
        dataclasses.replace(gemm_config("MXFP4", I, 8, biases=True), k_warps=1, strips=1),
        dataclasses.replace(gemm_config("MXFP4", I, 64, biases=True), tile=16, strips=2),
    ],
    ids=["dependent launch", "several ranges", "staged 16"],
)
def test_other_configurations(other: GemmConfig) -> None:
    case = random_case(MXFP4, 96, I, tokens=4)
    h = to_bf16(np.random.default_rng(1).standard_normal((8, I)))
    usual, _ = run_down(case, h, 8)
    arch = "sm_90" if other.pdl else "sm_80"
    found, _ = run_down(case, h, other.tile, arch, kernel=down.definition(other))
    assert np.array_equal(found.view(np.uint32), usual.view(np.uint32))
