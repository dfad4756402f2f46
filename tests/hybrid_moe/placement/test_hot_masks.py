"""Every form in which `gpu_experts` is given, and the sentences that refuse others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.placement.hot_masks import LayerOfExperts, hot_masks
from hybrid_moe.placement.profile import write_profile
from hybrid_moe.placement.strategies import generate_gpu_experts_masks, place_experts

MODEL = [LayerOfExperts(layer, 4, 1 << 20) for layer in (1, 2, 4)]
"""Layers 0 and 3 are dense; twelve experts of 1 MiB."""


def ids(gpu_experts: Any, layers: list[LayerOfExperts] = MODEL) -> dict[int, list[int]]:
    """Hot ids by layer."""
    masks = hot_masks(gpu_experts, layers, num_layers=5)
    assert list(masks) == [layer.layer for layer in layers]
    for layer in layers:
        assert masks[layer.layer].dtype == torch.bool and masks[layer.layer].device.type == "cpu"
        assert masks[layer.layer].shape == (layer.num_experts,)
    return {layer: mask.nonzero().flatten().tolist() for layer, mask in masks.items()}


@pytest.mark.parametrize(
    ("gpu_experts", "counts"),
    [
        (0, (0, 0, 0)),
        (0.0, (0, 0, 0)),
        (0.25, (1, 1, 1)),
        (np.float32(0.25), (1, 1, 1)),
        ("25%", (1, 1, 1)),
        (" 25 % ", (1, 1, 1)),
        ("0.25", (1, 1, 1)),
        (0.34, (2, 1, 1)),
        ("37.5%", (2, 1, 1)),
        (1.0, (4, 4, 4)),
        ("100%", (4, 4, 4)),
        ("1MiB", (1, 0, 0)),
        ("1.9 mb", (1, 0, 0)),
        ("8M", (3, 3, 2)),
        ("24GB", (4, 4, 4)),
    ],
)
def test_shares_and_budgets_are_spread_evenly(
    gpu_experts: Any, counts: tuple[int, int, int]
) -> None:
    assert ids(gpu_experts) == {
        layer: list(range(count)) for layer, count in zip((1, 2, 4), counts, strict=True)
    }


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(9, 200),
)
def test_a_budget_is_used_up(sizes: list[tuple[int, int]], budget: int) -> None:
    """Never more than the budget, and no expert that is left out would fit."""
    layers = [LayerOfExperts(i, E, nbytes) for i, (E, nbytes) in enumerate(sizes)]
    hot = hot_masks(f"{budget}B", layers)
    left = budget - sum(int(hot[layer.layer].sum()) * layer.nbytes for layer in layers)
    cold = [layer.nbytes for layer in layers if not hot[layer.layer].all()]
    assert left >= 0
    assert all(left < nbytes for nbytes in cold)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 36))
def test_a_share_is_the_uniform_strategy(L: int, E: int, count: int) -> None:
    count = min(count, L * E)
    layers = [LayerOfExperts(layer, E, 64) for layer in range(L)]
    expected = place_experts("uniform", L, E, count)
    assert torch.equal(torch.stack(list(hot_masks(count / (L * E), layers).values())), expected)


def test_masks_of_layers_with_experts_or_of_all() -> None:
    chosen = {1: [3], 2: [], 4: [0, 2]}
    masks = torch.zeros(3, 4, dtype=torch.bool)
    for row, experts in enumerate(chosen.values()):
        masks[row, experts] = True
    assert ids(masks) == ids(masks.numpy()) == chosen
    of_all = torch.ones(5, 4, dtype=torch.bool)  # dense layers are True, as in place_experts
    of_all[[1, 2, 4]] = masks
    assert ids(of_all) == chosen
    frequencies = torch.zeros(3, 4).masked_fill(masks, 1.0)
    assert ids(generate_gpu_experts_masks(frequencies, 3)) == chosen
    hot = hot_masks(masks, MODEL)
    masks[:] = True
    assert not hot[2].any(), "the caller's tensor and the result share no memory"


def test_mappings_and_profiles(tmp_path: Path) -> None:
    chosen = {1: [3], 2: [], 4: [0, 2]}
    assert ids({1: torch.tensor([3]), 2: (), 4: {2, 0}}) == chosen
    file = tmp_path / "hot.json"
    write_profile(file, {0: [0, 1], **chosen})  # of a dense layer nothing is asked
    assert ids(file) == ids(str(file)) == chosen


@pytest.mark.parametrize(
    ("gpu_experts", "error", "message"),
    [
        (None, TypeError, "gpu_experts is None, must be a share"),
        (True, TypeError, "gpu_experts is True"),
        ([0.25], TypeError, r"gpu_experts is \[0.25\]"),
        (1.5, ValueError, r"gpu_experts is 1.5, a share must be between 0 and 1"),
        (-0.1, ValueError, "gpu_experts is -0.1"),
        (float("nan"), ValueError, "gpu_experts is nan"),
        ("150%", ValueError, "gpu_experts is '150%', a share"),
        (0.01, ValueError, "gpu_experts is 0.01, less than one of 12 experts"),
        (1, ValueError, "gpu_experts is 1, and a number of experts could be of a layer or of all"),
        ("8", ValueError, "gpu_experts is '8', and a number"),
        ("1KB", ValueError, "gpu_experts is '1KB', too little for one expert of 1.00 MiB"),
        ("24 apples", FileNotFoundError, "gpu_experts is '24 apples', which is no file"),
        ("", FileNotFoundError, "gpu_experts is ''"),
        (Path("/nowhere.json"), FileNotFoundError, "'/nowhere.json', which is no file"),
        (torch.ones(3, 4), TypeError, "gpu_experts are masks of torch.float32, must be bool"),
        (torch.ones(4, 4, dtype=torch.bool), ValueError,
         r"shape \[4, 4\], must be \[3, 4\] or \[5, 4\] \(3 layers with experts, 5 layers in all"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"shape \[4\]"),
        ({1: [0], 2: [0]}, ValueError, r"gpu_experts has no layer 4 \(it has \[1, 2\]\)"),
        ({1: [4], 2: [], 4: []}, ValueError, "gpu_experts: layer 1 has expert 4"),
        ({1: [-1], 2: [], 4: []}, ValueError, r"gpu_experts\[1\] is \[-1\]"),
        ({1: [0, 0], 2: [], 4: []}, ValueError, r"gpu_experts\[1\] is \[0, 0\], must be distinct"),
        ({1: 3, 2: [], 4: []}, TypeError, r"gpu_experts\[1\] must be a list of integers"),
        ({1: ["a"], 2: [], 4: []}, TypeError, r"an expert of gpu_experts\[1\] must be an integer"),
        ({"one": []}, TypeError, "a layer of gpu_experts must be an integer"),
        ({1: [], 2: [], 4: [], 5: []}, ValueError, "has layer 5, but the model has layers 0..4"),
    ],
)  # fmt: skip
def test_what_is_refused(gpu_experts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hot_masks(gpu_experts, MODEL, num_layers=5)


def test_layers_of_several_sizes() -> None:
    """Where layers differ in their number of experts, masks are as wide as the widest."""
    layers = [LayerOfExperts(0, 2, 64), LayerOfExperts(1, 4, 64)]
    assert ids(1.0, layers) == {0: [0, 1], 1: [0, 1, 2, 3]}
    masks = torch.tensor([[True, False, False, False], [False, False, True, True]])
    assert ids(masks, layers) == {0: [0], 1: [2, 3]}
    masks[0, 3] = True
    with pytest.raises(ValueError, match=r"layer 0 has experts 0\.\.1"):
        ids(masks, layers)


def test_a_damaged_profile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "hot.json"
    file.write_text(json.dumps({"1": [0], "2": "all", "4": []}))
    with pytest.raises(ValueError, match=r"hot\.json: layer 2 must have a list"):
        ids(file)
