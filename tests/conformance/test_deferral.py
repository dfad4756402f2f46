"""Clauses of expert deferral: n experts per token may arrive one MoE layer later, none is lost.

Layers run in order, as in a model; SGLang gives the last one a deferral of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .kit import Batch, Kit, Weights, assert_close, mask_of


def _layers(kit: Kit, deferred: int, indices: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
    """Loaded wrappers of these layers, the last one without deferral."""
    counts = [deferred] * (len(indices) - 1) + [0]
    return [
        kit.load(layer_idx=index, max_deferred_experts_per_token=count)
        for index, count in zip(indices, counts, strict=True)
    ]


def _kept(batch: Batch, count: int) -> Batch:
    """The batch with all but the `count` highest weights of each token gone; -1 for the others."""
    order = batch.weights.argsort(dim=1, descending=True)
    ids = batch.ids.clone().scatter_(1, order[:, count:], -1)
    return Batch(batch.hidden, ids, batch.weights)


def _total(weights: list[Weights], batches: list[Batch]) -> np.ndarray:
    return np.sum([w.forward(b) for w, b in zip(weights, batches, strict=True)], axis=0)


@pytest.mark.parametrize("deferred", [0, 1, 2, 3])
def test_deferred_experts_arrive_with_the_next_layer(kit: Kit, deferred: int) -> None:
    """One token: its own lowest weights are deferred, into the next layer's output."""
    first, second, _ = _layers(kit, deferred)
    one, two = kit.batch(1, 1), kit.batch(1, 2)
    now = kit.weights[0].forward(_kept(one, 3 - deferred))
    assert_close(kit.forward(first, one), now)
    late = kit.weights[0].forward(one) - now
    expected = kit.weights[1].forward(_kept(two, 3 - deferred)) + late
    assert_close(kit.forward(second, two), expected)


@pytest.mark.parametrize("tokens", [1, 2, 6])
@pytest.mark.parametrize("deferred", [1, 3])
def test_deferral_loses_nothing_over_all_layers(kit: Kit, deferred: int, tokens: int) -> None:
    wrappers = _layers(kit, deferred)
    batches = [kit.batch(tokens, seed) for seed in range(3)]
    outputs = [kit.forward(w, b) for w, b in zip(wrappers, batches, strict=True)]
    assert_close(np.sum(outputs, axis=0), _total(kit.weights[:3], batches))


def test_deferral_loses_nothing_where_a_dense_layer_lies_between(kit: Kit) -> None:
    wrappers = _layers(kit, 2, (0, 2, 4))
    batches = [kit.batch(1, seed) for seed in range(3)]
    outputs = [kit.forward(w, b) for w, b in zip(wrappers, batches, strict=True)]
    assert_close(np.sum(outputs, axis=0), _total(kit.weights[0:5:2], batches))


def test_deferral_skips_minus_one_and_masked_experts(kit: Kit) -> None:
    wrappers = [
        kit.load(layer_idx=i, max_deferred_experts_per_token=n, gpu_experts_mask=mask_of(1, 6))
        for i, n in enumerate((1, 0))
    ]
    batches = [kit.batch(4, seed) for seed in range(2)]
    for batch in batches:
        batch.ids[0, 1] = -1
    outputs = [kit.forward(w, b) for w, b in zip(wrappers, batches, strict=True)]
    expected = [w.forward(b, skip={1, 6}) for w, b in zip(kit.weights[:2], batches, strict=True)]
    assert_close(np.sum(outputs, axis=0), np.sum(expected, axis=0))


def test_nothing_leaks_from_one_step_into_the_next(kit: Kit) -> None:
    wrappers = _layers(kit, 2)
    for step in range(4):
        tokens = 1 + step % 2
        batches = [kit.batch(tokens, 10 * step + seed) for seed in range(3)]
        outputs = [kit.forward(w, b) for w, b in zip(wrappers, batches, strict=True)]
        assert_close(np.sum(outputs, axis=0), _total(kit.weights[:3], batches))


def test_deferred_inputs_may_be_changed_in_place_right_after_submit(kit: Kit) -> None:
    first, second = _layers(kit, 2, (0, 1))
    one, two = kit.batch(1, 1), kit.batch(1, 2)
    expected = _total(kit.weights[:2], [one, two])
    outputs = []
    for wrapper, batch in ((first, one), (second, two)):
        wrapper.submit_forward(*batch.args, kit.stream)
        batch.ids.fill_(-1)
        batch.hidden.fill_(1e4)
        outputs.append(kit.sync(wrapper, batch.hidden))
    assert_close(np.sum(outputs, axis=0), expected)


def test_select_deferred_experts_keeps_the_highest_scores(kit: Kit) -> None:
    wrapper = kit.make()
    ids, scores = torch.tensor([[4, 2, 7]]), torch.tensor([[0.2, 0.5, 0.3]])
    now, later = wrapper.select_deferred_experts(ids.to(kit.device), scores.to(kit.device), 2)
    assert now.tolist() == [[-1, 2, 7]] and later.tolist() == [[4, -1, -1]]


def test_select_deferred_experts_protects_an_expert_for_the_whole_batch(kit: Kit) -> None:
    wrapper = kit.make()
    ids = torch.tensor([[4, 2, 7], [2, 5, 6]])
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    now, later = wrapper.select_deferred_experts(ids.to(kit.device), scores.to(kit.device), 1)
    assert now.tolist() == [[-1, 2, -1], [2, -1, 6]]
    assert later.tolist() == [[4, -1, 7], [-1, 5, -1]]


def test_select_deferred_experts_leaves_minus_one_alone(kit: Kit) -> None:
    wrapper = kit.make()
    ids, scores = torch.tensor([[4, -1, 7]]), torch.tensor([[0.2, 0.5, 0.3]])
    now, later = wrapper.select_deferred_experts(ids.to(kit.device), scores.to(kit.device), 2)
    assert now.tolist() == [[4, -1, 7]] and later.tolist() == [[-1, -1, -1]]
