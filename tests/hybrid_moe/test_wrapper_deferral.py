"""Deferral through wrappers: what a layer defers arrives in the next one, and nothing is lost."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hybrid_moe import wrapper as wrapper_module
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.hybrid_moe.fake_layer import FakeExpertLayer
from tests.reference import Evaluation, added, assert_within

LAYERS = (1, 2, 5)
"""Dense layers before, between: their indices are missing."""


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper_module, "ExpertLayer", FakeExpertLayer)


def model(deferred: int = 1, **arguments: Any) -> list[tuple[KTMoEWrapper, Weights]]:
    """Wrappers of one model with their weights."""
    pairs, chain = [], DeferralChain()
    for index in LAYERS:
        w = wrapper(
            layer_idx=index,
            max_deferred_experts_per_token=deferred,
            deferral_chain=chain,
            **arguments,
        )
        weights = Weights.random(seed=index)
        pairs.append((weights.load(w), weights))
    return pairs


def parts(weights: Weights, batch: Batch, protected_k: int) -> list[Evaluation]:
    now_and_later = split_deferred(batch.ids, batch.weights, protected_k, E)
    return [weights.expected(Batch(batch.hidden, ids, batch.weights)) for ids in now_and_later]


@pytest.mark.parametrize("deferred", [1, 2, K])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_deferred_experts_arrive_one_layer_later(deferred: int, tokens: int) -> None:
    layers = model(deferred)
    for step in range(2):
        carried: list[Evaluation] = []
        for at, (w, weights) in enumerate(layers):
            batch = Batch.random(tokens, seed=10 * step + at)
            if at < len(layers) - 1:
                now, later = parts(weights, batch, K - deferred)
            else:
                now, later = weights.expected(batch), None
            y = w.forward(*batch.args)
            assert_within(y.double().numpy(), added(now, *carried))
            carried = [later] if later is not None else []


def test_both_jobs_start_at_submit() -> None:
    (first, _), *_ = model()
    layer: Any = first._layer
    first.submit_forward(*Batch.random().args)
    assert len(layer.jobs) == 2


def test_last_layer_defers_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    weights, batch = Weights.random(), Batch.random()
    w = weights.load(
        wrapper(layer_idx=7, max_deferred_experts_per_token=2, deferral_chain=DeferralChain())
    )
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        for _ in range(2):
            y = w.forward(*batch.args)
            assert_within(y.double().numpy(), weights.expected(batch))
    assert [r.getMessage() for r in caplog.records].count(
        "layer 7 has no MoE layer after it: none of its experts is deferred"
    ) == 1


def test_skipping_the_next_layer_is_an_error_and_not_a_loss() -> None:
    (first, weights), (second, _), _ = model()
    batch = Batch.random()
    first.forward(*batch.args)
    with pytest.raises(RuntimeError, match="before layer 2 collected the experts that layer 1"):
        first.forward(*batch.args)
    y = first.forward(*batch.args)
    assert_within(y.double().numpy(), parts(weights, batch, K - 1)[0])
    with pytest.raises(RuntimeError, match="layer 2 was called with 4 tokens, but layer 1"):
        second.forward(*Batch.random(4).args)
    second.forward(*batch.args)


def test_a_fault_does_not_leave_a_stale_job_behind() -> None:
    (first, _), (second, weights), _ = model(strict=True)
    batch = Batch.random()
    first.forward(*batch.args)
    bad = batch.ids.clone()
    bad[0, 0] = -1
    with pytest.raises(IndexError):
        second.forward(batch.hidden, bad, batch.weights)
    layer: Any = first._layer
    assert all(job.waited for job in layer.jobs)
    y = second.forward(*batch.args)
    assert_within(y.double().numpy(), parts(weights, batch, K - 1)[0])


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_submit_that_fails_leaves_nothing_under_way(
    failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, _), (second, weights), (third, _) = model()
    batch, calls = Batch.random(), 0
    real = FakeExpertLayer.start

    def start(layer: FakeExpertLayer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise MemoryError("no scratch")
        return real(layer, *arguments)

    first.forward(*batch.args)
    with monkeypatch.context() as patch:
        patch.setattr(FakeExpertLayer, "start", start)
        with pytest.raises(MemoryError):
            second.forward(*batch.args)
    layers: list[Any] = [first._layer, second._layer]
    assert all(job.waited for layer in layers for job in layer.jobs)
    y = second.forward(*batch.args)
    assert_within(y.double().numpy(), parts(weights, batch, K - 1)[0])
    third.forward(*batch.args)


def test_ignored_ids_are_those_of_the_caller() -> None:
    (w, _), *_ = model()
    batch = Batch.random()
    batch.ids[0, 1] = -1
    w.forward(*batch.args)
    assert w.ignored_ids == 1


def test_models_of_one_shape_do_not_mix() -> None:
    first, second = model(), model()
    a, b = Batch.random(seed=1), Batch.random(4, seed=2)
    outputs = [
        (x.forward(*a.args), y.forward(*b.args))
        for (x, _), (y, _) in zip(first, second, strict=True)
    ]
    again = [x.forward(*a.args) for x, _ in first]
    for (one, other), alone in zip(outputs, again, strict=True):
        assert torch.equal(one, alone) and other.shape[0] == 4


def test_closing_the_next_layer_drops_what_was_deferred_to_it() -> None:
    (first, _), (second, _), (third, weights) = model()
    batch = Batch.random()
    first.forward(*batch.args)
    second.close()
    layer: Any = first._layer
    assert all(job.waited for job in layer.jobs)
    first.forward(*batch.args)  # to the third layer now
    y = third.forward(*batch.args)
    later = parts(Weights.random(seed=LAYERS[0]), batch, K - 1)[1]
    assert_within(y.double().numpy(), added(weights.expected(batch), later))


def test_select_deferred_experts() -> None:
    w = wrapper()
    now, later = w.select_deferred_experts(
        torch.tensor([[4, -1, 2]]), torch.tensor([[0.2, 0.7, 0.5]]), 1
    )
    assert now.tolist() == [[-1, -1, 2]] and later.tolist() == [[4, -1, -1]]
