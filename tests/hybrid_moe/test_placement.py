"""Global placement: the most used experts, ties shared fairly, any strides and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.placement import generate_gpu_experts_masks


@given(
    st.integers(1, 5).flatmap(
        lambda E: st.lists(
            st.lists(st.integers(0, 4), min_size=E, max_size=E), min_size=1, max_size=5
        )
    ),
    st.integers(0, 30),
)
def test_most_used_first_and_ties_balanced(freq: list[list[int]], total: int) -> None:
    table = torch.tensor(freq)
    mask = generate_gpu_experts_masks(table, total)
    assert mask.dtype == torch.bool and mask.shape == table.shape
    assert int(mask.sum()) == min(total, table.numel())
    chosen, others = table[mask], table[~mask]
    if chosen.numel() and others.numel():
        assert chosen.min() >= others.max()
        # no tie could move to a layer that would then still have fewer experts
        threshold, counts = chosen.min(), mask.sum(1)
        for giver in range(len(freq)):
            for taker in range(len(freq)):
                gives = bool((mask[giver] & (table[giver] == threshold)).any())
                takes = bool((~mask[taker] & (table[taker] == threshold)).any())
                assert not (gives and takes and counts[giver] > counts[taker] + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.uint8])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    freq = torch.tensor([[5, 1, 7], [2, 9, 3]], dtype=dtype)
    expected = torch.tensor([[True, False, True], [False, True, False]])
    strided = torch.stack([freq, freq], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(generate_gpu_experts_masks(freq, 3), expected)
    assert torch.equal(generate_gpu_experts_masks(strided, 3), expected)
    assert torch.equal(generate_gpu_experts_masks(freq.t(), 3), expected.t())


def test_ties_are_deterministic() -> None:
    expected = torch.tensor([[True, True, False, False], [True, False, False, False]])
    assert torch.equal(generate_gpu_experts_masks(torch.ones(2, 4), 3), expected)


@pytest.mark.parametrize(
    ("freq", "total", "error", "message"),
    [
        (torch.ones(4), 1, ValueError, r"shape \(4,\), must be \[layers, experts\]"),
        (torch.tensor([[1.0, float("nan")]]), 1, ValueError, r"activation_freq\[0, 1\] is NaN"),
        (torch.ones(1, 2), -1, ValueError, "num_gpu_experts is -1"),
        (torch.ones(1, 2), 1.5, TypeError, "num_gpu_experts must be an integer"),
        (torch.ones(1, 2, dtype=torch.complex64), 1, TypeError, "must be real"),
    ],
)
def test_bad_input(freq: torch.Tensor, total: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate_gpu_experts_masks(freq, total)
