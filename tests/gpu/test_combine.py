"""The sum of a token's experts: the reference against NumPy, the kernel against the reference."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.gpu_kernels.combine import combine, combine_launch, combine_ref
from hybrid_moe.gpu_kernels.definition import ARCHITECTURES
from tests.gpu.harness import Report, compiled, distinct_architectures, simulate

NAN = float("nan")
FROM_SM_90 = ("sm_90", "sm_100", "sm_120")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _batch(T: int, k: int, H: int, *, hot: float, wide: bool = True, seed: int = 0) -> Batch:
    """y, ids, weights, slot_of, cold. What does not count is NaN; an expert may occur twice."""
    rng = np.random.default_rng(seed)
    E = 12
    ids = rng.integers(-1, E + 1, (T, k))
    if wide and T > 1:
        ids[0, 0], ids[-1, -1] = 2**40, -(2**40)  # 0 in the lower half
    slot_of = np.where(rng.random(E) < hot, rng.permutation(E), -1).astype(np.int32)
    counts = (ids >= 0) & (ids < E) & (slot_of[ids.clip(0, E - 1)] >= 0)
    y = rng.standard_normal((T, k, H)).astype(np.float32)
    y[~counts] = NAN
    weights = np.where(counts, rng.random((T, k)), NAN).astype(np.float32)
    cold = rng.standard_normal((T, H)).astype(np.float32)
    tensors = (y.reshape(T * k, H), ids, weights, slot_of, cold)
    y_, ids_, *others = map(torch.from_numpy, tensors)
    return y_, ids_ if wide else ids_.int(), *others  # type: ignore[return-value]


def _plainly(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    cold: torch.Tensor | None,
) -> torch.Tensor:
    """Expert by expert, as docs/numerics.md says: every operation in float32, rounded once more."""
    T, k = ids.shape
    rows = y.numpy().reshape(T, k, y.shape[1])
    out = np.zeros((T, rows.shape[2]), np.float32)
    for t in range(T):
        for expert in range(len(slot_of)):
            for j in range(k):
                if ids[t, j] == expert and slot_of[expert] >= 0:
                    out[t] = out[t] + weights[t, j].numpy() * rows[t, j]
    if cold is not None:
        out = out + cold.numpy()
    return torch.from_numpy(out.astype(ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@settings(max_examples=40)
@given(
    T=st.integers(0, 5),
    k=st.integers(1, 16),
    H=st.sampled_from([32, 96]),
    hot=st.sampled_from([0, 0.5, 1]),
    wide=st.booleans(),
    with_cold=st.booleans(),
    seed=st.integers(0, 99),
)
def test_experts_are_added_in_ascending_order(
    T: int, k: int, H: int, hot: float, wide: bool, with_cold: bool, seed: int
) -> None:
    y, ids, weights, slot_of, cold = _batch(T, k, H, hot=hot, wide=wide, seed=seed)
    given_cold = cold if with_cold else None
    out = combine(y, ids, weights, slot_of, given_cold)
    assert _same_bits(out, _plainly(y, ids, weights, slot_of, given_cold))


@pytest.mark.parametrize(
    ("ids", "expected"), [([2, 0, 1], 1.0), ([0, 1, 2], 0.0), ([1, 1, 0], 0.0)]
)
def test_the_order_matters(ids: list[int], expected: float) -> None:
    """2^60 - 2^60 + 1, but 1 + 2^60 - 2^60 and -2^60 + 1 + 2^60 lose the 1."""
    y = torch.tensor([[1.0], [2.0**60], [-(2.0**60)]]).repeat(1, 32)
    slot_of = torch.arange(3, dtype=torch.int32)
    out = combine(y, torch.tensor([ids]), torch.ones(1, 3), slot_of)
    assert (out == expected).all()


def test_products_are_rounded() -> None:
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, which a fused product keeps."""
    y = torch.tensor([[1 + 2.0**-12], [-(1 + 2.0**-11)]]).repeat(1, 32)
    slot_of = torch.arange(2, dtype=torch.int32)
    weights = torch.tensor([[1 + 2.0**-12, 1.0]])
    assert (combine(y, torch.tensor([[1, 0]]), weights, slot_of) == 0).all()


def _run(
    batch: Batch,
    with_cold: bool,
    *,
    arch: str = "sm_80",
    pdl: bool = False,
    rounded: bool = True,
    seed: int | None = None,
) -> Report:
    y, ids, weights, slot_of, cold = batch
    given_cold = cold if with_cold else None
    dtype = torch.bfloat16 if rounded else torch.float32
    out = torch.full((ids.shape[0], y.shape[1]), NAN, dtype=dtype)
    launch = combine_launch(y, ids, weights, slot_of, given_cold, out, pdl=pdl)
    report = simulate(launch.definition, arch, launch.grid, launch.values, seed=seed)
    assert _same_bits(out, combine_ref(y, ids, weights, slot_of, given_cold, rounded=rounded))
    assert not out.isnan().any()
    return report


CASES: list[tuple[dict[str, Any], bool]] = [
    ({"T": 3, "k": 1, "H": 32, "hot": 0.5}, False),
    ({"T": 2, "k": 4, "H": 544, "hot": 0.6, "wide": False}, True),
    ({"T": 2, "k": 8, "H": 1056, "hot": 1}, True),
    ({"T": 3, "k": 16, "H": 96, "hot": 0.7}, False),
    ({"T": 2, "k": 4, "H": 96, "hot": 0, "wide": False}, True),
]


@pytest.mark.parametrize(("batch", "with_cold"), CASES, ids=[str(case[0]) for case in CASES])
def test_the_kernel_equals_the_reference(batch: dict[str, Any], with_cold: bool) -> None:
    for seed in (None, 1, 2):
        _run(_batch(**batch), with_cold, seed=seed)


def test_a_sum_to_which_more_is_added() -> None:
    """In float32 without the CPU's part; adding it and rounding gives the bits of one kernel."""
    batch = _batch(3, 4, 160, hot=0.6)
    _run(batch, False, rounded=False, seed=1)
    *hot, cold = batch
    total = combine(*hot, rounded=False)
    assert total.dtype == torch.float32
    assert _same_bits((total + cold).to(torch.bfloat16), combine(*batch))


@pytest.mark.parametrize("pdl", [False, True], ids=["before sm_90", "from sm_90 on"])
def test_the_kernel_on_all_architectures(pdl: bool) -> None:
    batch = _batch(2, 6, 608, hot=0.6)
    definition = combine_launch(
        *batch, torch.empty(2, 608, dtype=torch.bfloat16), pdl=pdl
    ).definition
    architectures = [arch for arch in ARCHITECTURES if (arch in FROM_SM_90) == pdl]
    for arch in distinct_architectures(definition, architectures):
        _run(batch, True, arch=arch, pdl=pdl, seed=3)
        # What is not marked as rounded, the assembler may fuse with the addition behind it.
        products = re.findall(r"\bmul\S*f32|\bfma\S*f32", compiled(definition, arch).ptx)
        assert set(products) == {"mul.rn.f32"}


def test_rows_are_read_once_in_whole_sectors() -> None:
    """Each row of a hot pair once from memory, none of another; vectors of 16 bytes."""
    batch = _batch(3, 6, 512, hot=0.5)
    y, ids, _, _, _ = batch
    report = _run(batch, True)
    hot = int((~y[:, 0].isnan()).sum())
    assert 0 < hot < ids.numel()
    assert report.reads["y"].distinct_bytes == hot * 512 * 4
    for access in (*report.of("y"), *report.of("cold"), *report.of("out", "st")):
        assert access.efficiency == 1, access
    assert all("v4" in access.instruction.op for access in report.of("y"))
    assert not report.bank_conflicts()


Y, IDS, WEIGHTS, SLOT_OF, COLD = _batch(4, 2, 64, hot=1)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"y": Y.double()}, TypeError, "y is torch.float64, must be torch.float32"),
    ({"y": Y[:7]}, ValueError, r"y has shape \(7, 64\), must be \(8, 64\)"),
    ({"y": Y[:, :40]}, ValueError, r"y has shape \(8, 40\), must be \(8, H\), .* multiple of 32"),
    ({"y": Y.T.contiguous().T}, ValueError, "y has strides"),
    ({"ids": IDS.short()}, TypeError, "ids is torch.int16"),
    ({"ids": IDS[0]}, ValueError, r"ids has shape \(2,\)"),
    ({"weights": WEIGHTS.bfloat16()}, TypeError, "weights is torch.bfloat16"),
    ({"weights": WEIGHTS[:, :1]}, ValueError, r"weights has shape \(4, 1\), must be \(4, 2\)"),
    ({"slot_of": SLOT_OF[None]}, ValueError, r"slot_of has shape \(1, 12\), must be \(E,\)"),
    ({"cold": COLD[:, :32]}, ValueError, r"cold has shape \(4, 32\), must be \(4, 64\)"),
    ({"cold": COLD.bfloat16()}, TypeError, "cold is torch.bfloat16"),
    ({"cold": COLD.to("meta")}, ValueError, "cold is on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_arguments_are_checked(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"y": Y, "ids": IDS, "weights": WEIGHTS, "slot_of": SLOT_OF, "cold": COLD}
    with pytest.raises(error, match=message):
        combine(**{**arguments, **change})
