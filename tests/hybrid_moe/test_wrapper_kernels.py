"""The wrapper on the real kernels, against the float64 reference and its error bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.wrapper import KTMoEWrapper
from tests.cpu_kernels.cases import ACTIVATION_ERROR
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.reference import assert_within

OPTIONS: list[dict[str, float]] = [{}, {"limit": 0.5}, {"limit": 0.5, "alpha": 1.702}]


def check(
    output: torch.Tensor, weights: Weights, batch: Batch, method: str, **options: Any
) -> None:
    error = ACTIVATION_ERROR[method]
    expected = weights.expected(batch, method, activation_error=error, **options)
    assert output.dtype == torch.bfloat16
    assert_within(output.double().numpy(), expected)


@pytest.mark.parametrize("method", DENSE_FORMATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_within_the_contract(method: str, options: dict[str, float], bias: bool) -> None:
    weights = Weights.random(bias=bias)
    arguments = {f"swiglu_{name}": value for name, value in options.items()}
    w = weights.load(wrapper(method=method, **arguments))
    for tokens in (0, 1, 3, 40):
        batch = Batch.random(tokens, seed=tokens)
        check(w.forward(*batch.args), weights, batch, method, **options)
    w.close()


def test_checkpoint_mask_and_ids(tmp_path: Path) -> None:
    weights, batch = Weights.random(), Batch.random(6)
    mask = torch.arange(E) % 3 == 0
    w = wrapper(weight_path=weights.save(tmp_path), gpu_experts_mask=mask)
    w.load_weights(torch.arange(E))
    batch.ids[2] = -1
    batch.ids[3, 1] = E
    y = w.forward(*batch.args)
    check(y, weights, batch, "MXFP4", skip=mask.numpy())
    assert not y[2].any() and w.ignored_ids == K + 1
    w.gpu_experts_mask.fill_(True)
    assert not w.forward(*batch.args).any()
    KTMoEWrapper.force_release_loader()


@pytest.fixture(scope="module")
def shared() -> tuple[KTMoEWrapper, Weights]:
    weights = Weights.random(seed=5, bias=True)
    return weights.load(wrapper()), weights


@settings(max_examples=30, deadline=None)
@given(data=st.data(), tokens=st.integers(0, 9), mask=st.integers(0, 2**E - 1))
def test_any_routing(
    shared: tuple[KTMoEWrapper, Weights], data: st.DataObject, tokens: int, mask: int
) -> None:
    """Any ids (nobody's, repeated in a token) under any mask."""
    w, weights = shared
    batch = Batch.random(tokens, seed=tokens)
    ids = data.draw(st.lists(st.integers(-1, E), min_size=tokens * K, max_size=tokens * K))
    batch.ids = torch.tensor(ids, dtype=torch.int64).reshape(tokens, K)
    w.gpu_experts_mask = torch.tensor([bool(mask >> e & 1) for e in range(E)])
    check(w.forward(*batch.args), weights, batch, "MXFP4", skip=w.gpu_experts_mask.numpy())


def test_nan_stays_in_its_row() -> None:
    weights, batch = Weights.random(), Batch.random(6)
    w = weights.load(wrapper())
    clean = w.forward(*batch.args)
    hidden = batch.hidden.clone()
    hidden[4, 7] = float("nan")
    y = w.forward(hidden, batch.ids, batch.weights)
    assert y[4].isnan().any()
    others = torch.arange(6) != 4
    assert torch.equal(y[others], clean[others])


def test_layers_under_way_at_once_share_their_threads() -> None:
    weights = [Weights.random(seed=i) for i in range(3)]
    layers = [w.load(wrapper(layer_idx=i)) for i, w in enumerate(weights)]
    batches = [Batch.random(4 + i, seed=i) for i in range(3)]
    for layer, batch in zip(layers, batches, strict=True):
        layer.submit_forward(*batch.args)
    for i in (2, 0, 1):
        y = layers[i].sync_forward(batches[i].hidden)
        check(y, weights[i], batches[i], "MXFP4")


def test_inputs_are_captured_by_submit() -> None:
    weights, batch = Weights.random(), Batch.random(3)
    w = weights.load(wrapper())
    given = Batch(*(t.clone() for t in batch.args))
    w.submit_forward(*given.args)
    for tensor in given.args:
        tensor.zero_()
    check(w.sync_forward(given.hidden), weights, batch, "MXFP4")


def test_deferral_loses_nothing() -> None:
    """With the second layer's routing empty, both outputs together are the first layer's."""
    weights, batch, chain = Weights.random(), Batch.random(2), DeferralChain()
    first = weights.load(wrapper(max_deferred_experts_per_token=1, deferral_chain=chain))
    second = weights.load(wrapper(layer_idx=1, deferral_chain=chain))
    now = first.forward(*batch.args)
    later = second.forward(batch.hidden, torch.full_like(batch.ids, -1), batch.weights)
    expected = weights.expected(batch)
    total = now.double() + later.double()
    error = (total.numpy() - expected.value) / expected.sigma
    assert now.any() and later.any() and abs(error).max() <= 8
