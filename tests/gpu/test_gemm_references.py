"""`gate_up` and `down` where there is no GPU: the references, checked arguments, configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4, MXFP8
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.gpu_kernels import down, gate_up
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.fragments import permute, unpermute
from hybrid_moe.gpu_kernels.gemm_config import (
    MOST_SHARED_BYTES,
    STAGE_GROUPS,
    TOKEN_TILES,
    gemm_config,
    k_ranges,
    range_bounds,
    token_tile,
)
from hybrid_moe.gpu_kernels.weight_codes.objects import check_kernels, needs_wide
from tests.cpu_kernels.cases import from_bf16
from tests.gpu.gemm_cases import GPT_OSS, Case, expected_h, expected_y, random_case, tiles_of

Change = Callable[[ExpertTiles], ExpertTiles]


def _tiles(case: Case, table: np.ndarray, tile: int = 8) -> ExpertTiles:
    slots = len(case.slots.memory)
    return ExpertTiles(
        torch.from_numpy(case.slots.memory),
        torch.from_numpy(table),
        torch.zeros(slots, dtype=torch.int32),
        *map(torch.from_numpy, tiles_of(case.slot_of_pair, tile)),
    )


def _bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS], ids=["silu", "gpt-oss"])
def test_references(fmt: WeightFormat, activation: Activation) -> None:
    case = random_case(fmt, 96, 160, activation=activation, bias=activation.alpha > 0)
    layout = case.slots.layout
    tiles = _tiles(case, layout.gate_up_table)
    h = gate_up.gate_up(layout, activation, tiles, permute(_bf16(case.x), fmt), case.k)
    assert h.dtype == torch.bfloat16 and h.shape == (22, 160)
    bits = unpermute(h, fmt).contiguous().view(torch.int16).numpy().view(np.uint16)
    expected_h(case).check(from_bf16(bits[case.hot]))
    y = down.down(layout, _tiles(case, layout.down_table), h)
    assert y.dtype == torch.float32 and y.shape == (22, 96)
    expected_y(case, bits).check(y.numpy()[case.hot].astype(np.float64))


def _replaced(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tiles: ExpertTiles) -> ExpertTiles:
        fields = {name: make(getattr(tiles, name)) for name, make in changes.items()}
        return dataclasses.replace(tiles, **fields)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_replaced(memory=lambda m: m[:, :-64].contiguous()), ValueError, "memory has shape"),
        (_replaced(memory=lambda m: m.view(torch.int8)), TypeError, "memory is torch.int8"),
        (_replaced(table=lambda t: t[1:]), ValueError, "table has shape"),
        (_replaced(wide=lambda w: w.long()), TypeError, "wide is torch.int64"),
        (_replaced(tile_slot=lambda s: s[:-1]), ValueError, "tile_rows has shape"),
        (_replaced(tile_rows=lambda r: r[:, :6].contiguous()), ValueError, "tile_rows has tiles"),
        (_replaced(tile_rows=lambda r: r.T.contiguous().T), ValueError, "tile_rows has strides"),
        (_replaced(num_tiles=lambda n: n[0]), ValueError, "num_tiles has shape"),
    ],
)
def test_bad_tiles(change: Change, error: type[Exception], message: str) -> None:
    case = random_case(MXFP4, 96, 64)
    layout = case.slots.layout
    x, h = torch.zeros(11, 96, dtype=torch.bfloat16), torch.zeros(22, 64, dtype=torch.bfloat16)
    with pytest.raises(error, match=message):
        gate_up.gate_up(layout, GPT_OSS, change(_tiles(case, layout.gate_up_table)), x, 2)
    with pytest.raises(error, match=message):
        down.down(layout, change(_tiles(case, layout.down_table)), h)


def test_bad_activations() -> None:
    case = random_case(MXFP4, 96, 64)
    layout = case.slots.layout
    tiles = _tiles(case, layout.gate_up_table)
    x = torch.zeros(11, 96, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"xp is torch\.float32"):
        gate_up.gate_up(layout, GPT_OSS, tiles, x.float(), 2)
    with pytest.raises(ValueError, match="xp has shape"):
        gate_up.gate_up(layout, GPT_OSS, tiles, x[:, :64].contiguous(), 2)
    with pytest.raises(ValueError, match="k is 0"):
        gate_up.gate_up(layout, GPT_OSS, tiles, x, 0)
    with pytest.raises(ValueError, match="h has shape"):
        down.down(layout, _tiles(case, layout.down_table), x)


def test_a_format_without_kernels_says_so() -> None:
    odd = dataclasses.replace(MXFP4, name="ODD", scaling="odd")
    with pytest.raises(NotImplementedError, match="ODD has no GPU kernels yet: there are MXFP4, "):
        check_kernels(LayerFormats(MXFP4, odd))
    for fmt in FORMATS.values():
        check_kernels(fmt)


def test_impossible_configurations() -> None:
    with pytest.raises(ValueError, match="tile is 24"):
        gemm_config("MXFP4", 512, 24, biases=False)
    with pytest.raises(ValueError, match="K = 32768"):
        gemm_config("MXFP4", 32768, 8, biases=False)


def test_wide_experts() -> None:
    scales = np.array([[0, 127], [128, 1]], np.uint8)
    assert not needs_wide(MXFP4, scales) and not needs_wide(MXFP4, torch.from_numpy(scales))
    assert needs_wide(MXFP4, scales + np.uint8(1))
    inside = np.array([[3, 127], [134, 4]], np.uint8)
    assert not needs_wide(MXFP8, inside) and not needs_wide(MXFP8, torch.from_numpy(inside))
    assert needs_wide(MXFP8, inside - np.uint8(1)) and needs_wide(MXFP8, inside + np.uint8(1))
    assert not needs_wide(INT8, np.full((2, 2), 60000, np.float16))


@given(st.integers(1, 700).map(lambda groups: 32 * groups))
def test_ranges_cover_all_groups(K: int) -> None:
    bounds = range_bounds(K)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == K // 32 and len(sizes) == k_ranges(K)
    assert sizes.min() > 0 and sizes.max() <= 16 and np.ptp(sizes) <= 2 * STAGE_GROUPS
    assert all(bound % STAGE_GROUPS == 0 for bound in bounds[:-1])


@given(
    st.integers(1, 700).map(lambda groups: 32 * groups),
    st.sampled_from(TOKEN_TILES),
    st.sampled_from(sorted(FORMATS)),
)
def test_configurations_are_possible(K: int, tile: int, fmt: str) -> None:
    """Up to 8 warps, the shared memory that every architecture has, and a warp for every range."""
    config = gemm_config(fmt, K, tile, biases=False)
    assert 1 <= config.warps <= 8 and config.shared_bytes <= MOST_SHARED_BYTES
    assert config.staged or config.k_warps <= config.ranges
    assert config.grid(17, 5) == (-(-17 // config.strips), 5)


def test_tiles_follow_the_average() -> None:
    assert [token_tile(pairs, 128) for pairs in (4, 921, 922, 1900, 3600, 3700, 10**6)] == [
        8, 8, 16, 32, 32, 64, 64,
    ]  # fmt: skip
