"""Global placement: the most used experts, ties shared fairly, any strides and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.placement.strategies import STRATEGIES, generate_gpu_experts_masks, place_experts


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


MODEL = st.tuples(
    st.integers(1, 7), st.integers(1, 6), st.integers(0, 50), st.integers(0, 8), st.integers(1, 3)
)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "frequency"])
@given(MODEL)
def test_strategies_place_exactly_so_many_experts_of_moe_layers(
    strategy: str, model: tuple[int, int, int, int, int]
) -> None:
    layers, E, total, first, every = model
    freq = None
    if strategy == "frequency":
        freq = torch.rand(layers, E, generator=torch.Generator().manual_seed(total))
    masks = place_experts(
        strategy,
        layers,
        E,
        total,
        first_k_dense_replace=first,
        moe_layer_freq=every,
        activation_freq=freq,
    )
    moe = [i for i in range(layers) if i >= first and i % every == 0]
    dense = [i for i in range(layers) if i not in moe]
    assert masks.dtype == torch.bool and masks.shape == (layers, E)
    assert masks[dense].all()
    assert int(masks[moe].sum()) == min(total, len(moe) * E)
    counts = masks[moe].sum(1).tolist()
    if strategy == "uniform":
        assert counts == sorted(counts, reverse=True)
        assert not counts or max(counts) - min(counts) <= 1
    if strategy == "front-loading":
        assert sum(0 < count < E for count in counts) <= 1
        assert counts == sorted(counts, reverse=True)
    if strategy in ("uniform", "front-loading"):  # the first ids of each layer
        assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in masks[moe])
    if freq is not None and moe:
        chosen, others = freq[moe][masks[moe]], freq[moe][~masks[moe]]
        assert not chosen.numel() or not others.numel() or chosen.min() >= others.max()


def test_random_placement_is_the_same_at_each_call_and_that_of_sglang_kt() -> None:
    masks = place_experts("random", 4, 5, 6, first_k_dense_replace=1)
    assert torch.equal(masks, place_experts("random", 4, 5, 6, first_k_dense_replace=1))
    positions = [(layer, expert) for layer in range(1, 4) for expert in range(5)]
    order = torch.randperm(15, generator=torch.Generator().manual_seed(42))[:6].tolist()
    assert {tuple(p) for p in masks[1:].nonzero().tolist()} == {
        (layer - 1, expert) for layer, expert in (positions[i] for i in order)
    }


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("best", 2, 4, 1), {}, ValueError, "unknown strategy 'best': there are frequency, "),
        (("cost", 2, 4, 1), {}, ValueError, "needs sizes and speeds: call .*place_by_cost"),
        (("frequency", 2, 4, 1), {}, ValueError, "activation_freq is missing"),
        (("uniform", 2, 4, 1), {"activation_freq": torch.ones(2, 4)}, ValueError, "is given"),
        (("frequency", 2, 4, 1), {"activation_freq": torch.ones(3, 4)}, ValueError, r"\(3, 4\)"),
        (("uniform", 0, 4, 1), {}, ValueError, "num_layers is 0, must be 1 or more"),
        (("uniform", 2, 4, -1), {}, ValueError, "num_gpu_experts is -1"),
        (("uniform", 2, 4, 1), {"moe_layer_freq": 0}, ValueError, "moe_layer_freq is 0"),
        (("uniform", 2, 4, 0.5), {}, TypeError, "num_gpu_experts must be an integer"),
    ],
)
def test_bad_strategy_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        place_experts(*arguments, **options)
