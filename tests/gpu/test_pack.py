"""Pairs into tiles: the reference against plain Python, the kernels against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.definition import ARCHITECTURES
from hybrid_moe.gpu_kernels.fragments import permute
from hybrid_moe.gpu_kernels.pack_tokens import (
    PackedTokens,
    empty_packed,
    max_tiles,
    pack,
    pack_launches,
    pack_ref,
    piece_order,
    takes_one_launch,
)
from tests.gpu.harness import Report, distinct_architectures, simulate

UNTOUCHED = -77
FROM_SM_90 = ("sm_90", "sm_100", "sm_120")


def _batch(
    T: int, k: int, E: int, hot: int, *, H: int = 64, wide: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids, slot_of: ids of all kinds, an expert may occur twice in a token."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((T, H))).to(torch.bfloat16)
    ids = torch.from_numpy(rng.integers(-2, E + 2, (T, k)))
    if wide and T > 1:
        ids[0, 0], ids[-1, -1] = 2**40, -(2**40)  # 0 in the lower half
    slot_of = torch.full((E,), -1, dtype=torch.int32)
    slot_of[rng.permutation(E)[:hot]] = torch.from_numpy(rng.permutation(hot).astype(np.int32))
    return x, ids if wide else ids.int(), slot_of


def _plainly(
    ids: torch.Tensor, slot_of: torch.Tensor, tile: int
) -> tuple[list[int], list[list[int]]]:
    """tile_slot and tile_rows, without padding."""
    pairs_of: dict[int, list[int]] = {}
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < len(slot_of) and slot_of[expert] >= 0:
            pairs_of.setdefault(expert, []).append(pair)
    slots, rows = [], []
    for expert in sorted(pairs_of):
        pairs = pairs_of[expert]
        for at in range(0, len(pairs), tile):
            slots.append(int(slot_of[expert]))
            rows.append(pairs[at : at + tile])
    return slots, rows


@settings(max_examples=60)
@given(st.data())
def test_every_hot_pair_is_in_one_tile_of_its_expert(data: st.DataObject) -> None:
    """In the order that is promised, and nothing else is in any tile."""
    T, k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 16))
    E = data.draw(st.sampled_from([1, 2, 7, 64, 1024]))
    hot = data.draw(st.integers(0, E))
    tile = data.draw(st.sampled_from([8, 16, 24, 64]))
    fmt = data.draw(st.sampled_from(list(DENSE_FORMATS.values())))
    x, ids, slot_of = _batch(T, k, E, hot, wide=data.draw(st.booleans()), seed=T * k + hot)
    if data.draw(st.booleans()):
        ids[:] = data.draw(st.integers(0, E - 1))  # one expert has all
    packed = pack(x, ids, slot_of, fmt=fmt, slots=max(hot, 1), tile=tile)
    slots, rows = _plainly(ids, slot_of, tile)
    count = int(packed.num_tiles)
    assert packed.tile_slot[:count].tolist() == slots
    padded = [row + [-1] * (tile - len(row)) for row in rows]
    assert packed.tile_rows[:count].tolist() == padded
    assert packed.tile_rows.shape == (max_tiles(T * k, max(hot, 1), tile), tile)
    assert (packed.tile_slot[count:] == -1).all() and (packed.tile_rows[count:] == -1).all()
    assert torch.equal(packed.xp, permute(x, fmt))


@pytest.mark.parametrize("tile", [8, 32])
@pytest.mark.parametrize(("pairs", "slots"), [(1, 1), (8, 3), (17, 4), (40, 100)])
def test_the_most_tiles_are_reached(pairs: int, slots: int, tile: int) -> None:
    """By one pair for each slot but the last, which gets the others, give or take a full tile."""
    ids = torch.arange(pairs).clamp(max=slots - 1)[:, None]
    slot_of = torch.arange(slots, dtype=torch.int32)
    x = torch.zeros(pairs, 32, dtype=torch.bfloat16)
    count = int(pack(x, ids, slot_of, fmt=MXFP4, slots=slots, tile=tile).num_tiles)
    assert max_tiles(pairs, slots, tile) - 1 <= count <= max_tiles(pairs, slots, tile)


def _run(
    x: torch.Tensor,
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    *,
    fmt: WeightFormat,
    tile: int,
    few: bool,
    arch: str = "sm_80",
    pdl: bool = False,
    seed: int | None = None,
) -> list[Report]:
    """Run the kernels, compare them with the reference, and see that nothing else was written."""
    slots = max(1, int((slot_of >= 0).sum()))
    packed = empty_packed(x, ids.numel(), slots, tile)
    launches = pack_launches(x, ids, slot_of, packed, fmt=fmt, few=few, pdl=pdl)
    given = {id(tensor) for tensor in (x, ids, slot_of)}
    for launch in launches:  # memory between kernels holds anything
        for value in launch.values:
            if isinstance(value, torch.Tensor) and id(value) not in given:
                value.fill_(UNTOUCHED)
    reports = [
        simulate(launch.definition, arch, launch.grid, launch.values, seed=seed)
        for launch in launches
    ]
    _check(packed, pack_ref(x, ids, slot_of, fmt=fmt, slots=slots, tile=tile))
    return reports


def _check(packed: PackedTokens, expected: PackedTokens) -> None:
    count = int(expected.num_tiles)
    assert int(packed.num_tiles) == count
    for found, wanted in (
        (packed.tile_slot, expected.tile_slot),
        (packed.tile_rows, expected.tile_rows),
    ):
        assert torch.equal(found[:count], wanted[:count])
        assert (found[count:] == UNTOUCHED).all()
    assert torch.equal(packed.xp, expected.xp)


SOME = {"fmt": MXFP4, "tile": 8}
OTHER = {"fmt": BF16, "tile": 16}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one token": ({"T": 1, "k": 8, "E": 128, "hot": 32, "H": 96}, SOME),
    "a batch": ({"T": 14, "k": 4, "E": 16, "hot": 9}, SOME),
    "more experts in tiles": ({"T": 25, "k": 10, "E": 5, "hot": 5, "wide": False}, OTHER),
    "k = 16, E = 1024": ({"T": 16, "k": 16, "E": 1024, "hot": 700}, SOME),
    "one expert": ({"T": 32, "k": 8, "E": 1, "hot": 1, "wide": False}, OTHER),
    "all cold": ({"T": 9, "k": 3, "E": 12, "hot": 0}, SOME),
}


@pytest.mark.parametrize("few", [True, False], ids=["one launch", "three launches"])
@pytest.mark.parametrize(("batch", "how"), CASES.values(), ids=CASES.keys())
def test_kernels_equal_the_reference(batch: dict[str, Any], how: dict[str, Any], few: bool) -> None:
    """One launch and three give the same, in lockstep and in random schedules."""
    x, ids, slot_of = _batch(**batch)
    for seed in (None, 1, 2):
        _run(x, ids, slot_of, few=few, seed=seed, **how)


@pytest.mark.parametrize("pdl", [False, True], ids=["before sm_90", "from sm_90 on"])
@pytest.mark.parametrize("few", [True, False], ids=["one launch", "three launches"])
def test_kernels_on_all_architectures(few: bool, pdl: bool) -> None:
    x, ids, slot_of = _batch(20, 6, 40, 30)
    packed = empty_packed(x, ids.numel(), 30, 8)
    launches = pack_launches(x, ids, slot_of, packed, fmt=INT8, few=few, pdl=pdl)
    candidates = [arch for arch in ARCHITECTURES if (arch in FROM_SM_90) == pdl]
    for arch in sorted(
        {a for each in launches for a in distinct_architectures(each.definition, candidates)}
    ):
        _run(x, ids, slot_of, few=few, fmt=INT8, tile=8, arch=arch, pdl=pdl, seed=3)


def test_many_chunks() -> None:
    """Two or one for each warp that adds up counts, and tiles in many places of a chunk."""
    x, ids, slot_of = _batch(300, 10, 70, 50, H=32)
    assert not takes_one_launch(ids.numel())
    _run(x, ids, slot_of, few=False, **SOME)


@pytest.mark.full
def test_as_many_pairs_as_a_prompt_has() -> None:
    x, ids, slot_of = _batch(4096, 16, 1024, 900, H=32)
    _run(x, ids, slot_of, few=False, **SOME)


def test_zero_tokens() -> None:
    x, ids, slot_of = _batch(0, 4, 8, 8)
    assert takes_one_launch(0)
    _run(x, ids, slot_of, few=True, **SOME)


def test_memory_is_read_in_whole_sectors() -> None:
    """Ids and activations; so are permuted activations written, and banks do not conflict."""
    x, ids, slot_of = _batch(32, 8, 128, 64, H=128)
    (report,) = _run(x, ids, slot_of, few=True, **SOME)
    count, scan, scatter = _run(x, ids, slot_of, few=False, **SOME)
    for each in (report, count):
        for access in (*each.of("ids"), *each.of("x"), *each.of("xp", "st")):
            assert access.efficiency == 1, access
        assert each.of("x") and all("v4" in access.instruction.op for access in each.of("x"))
    for access in (*scan.of("counts"), *scan.of("counts", "st"), *scatter.of("keys")):
        assert access.efficiency == 1, access
    assert not report.bank_conflicts() and not count.bank_conflicts()
    assert not scan.bank_conflicts()


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_pieces_of_a_group_are_permuted_apart(fmt: WeightFormat) -> None:
    """Together they are the group's order; with 4-bit codes a piece is 16 bytes."""
    order = piece_order(fmt)
    x = torch.arange(32)
    pieces = [x[at : at + len(order)][list(order)] for at in range(0, 32, len(order))]
    assert torch.equal(torch.cat(pieces), permute(x, fmt))
    assert len(order) == (8 if fmt.bits == 4 else 32)


X, IDS, SLOT_OF = _batch(4, 2, 8, 8)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X[:, :40]}, ValueError, r"x has shape \(4, 40\), must be \(tokens, H\)"),
    ({"x": X[0]}, ValueError, r"x has shape \(64,\)"),
    ({"x": X.float()}, TypeError, "x is torch.float32, must be torch.bfloat16"),
    ({"x": X.T.contiguous().T}, ValueError, "x has strides"),
    ({"ids": IDS.float()}, TypeError, "ids is torch.float32, must be torch.int32 or"),
    ({"ids": IDS[:3]}, ValueError, r"ids has shape \(3, 2\), must be \(4, 2\)"),
    ({"ids": IDS[0]}, ValueError, r"ids has shape \(2,\), must be \(4, k\), k from 1 to 16"),
    ({"ids": IDS.repeat(1, 9)}, ValueError, r"ids has shape \(4, 18\), must be .* 1 to 16"),
    ({"ids": IDS.T.contiguous().T}, ValueError, "ids has strides"),
    ({"ids": IDS.to("meta")}, ValueError, "ids is on meta"),
    ({"slot_of": SLOT_OF.long()}, TypeError, "slot_of is torch.int64, must be torch.int32"),
    ({"slot_of": SLOT_OF[:0]}, ValueError, r"slot_of has shape \(0,\), must be \(E,\)"),
    ({"slot_of": SLOT_OF.repeat(200)}, ValueError, r"slot_of .* E from 1 to 1024"),
    ({"slots": 0}, ValueError, "slots is 0, must be at least 1"),
    ({"tile": 12}, ValueError, "tile is 12, must be a positive multiple of 8"),
    ({"tile": 0}, ValueError, "tile is 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_arguments_are_checked(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": X, "ids": IDS, "slot_of": SLOT_OF, "fmt": MXFP4, "slots": 8, "tile": 8}
    with pytest.raises(error, match=message):
        pack(**{**arguments, **change})
