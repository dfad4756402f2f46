"""Decode steps on CPU tensors: no checks or copies that are not needed, and the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.small import SMALL_TOKENS
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, H, K, Weights, wrapper

WEIGHTS = Weights.random()


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the calls that took the short way."""
    calls: list[int] = []
    real = ExpertLayer.small

    def small(self: ExpertLayer, tokens: int, *arguments: Any) -> Any:
        calls.append(tokens)
        return real(self, tokens, *arguments)

    monkeypatch.setattr(ExpertLayer, "small", small)
    return calls


def loaded(**arguments: Any) -> KTMoEWrapper:
    return WEIGHTS.load(wrapper(**arguments))


def long_way(w: KTMoEWrapper, batch: Batch) -> torch.Tensor:
    """The same batch as int32 ids, which must be converted first."""
    return w.forward(batch.hidden, batch.ids.to(torch.int32), batch.weights)


@pytest.mark.parametrize("threads", [1, 2])
def test_both_ways_have_the_same_bits(threads: int, small_calls: list[int]) -> None:
    w = loaded(cpuinfer_threads=threads)
    w.gpu_experts_mask[2] = True
    for tokens in range(SMALL_TOKENS + 2):
        batch = Batch.random(tokens, seed=tokens)
        assert torch.equal(w.forward(*batch.args), long_way(w, batch))
    assert small_calls == list(range(1, SMALL_TOKENS + 1))


def test_inputs_and_mask_are_captured_by_submit(small_calls: list[int]) -> None:
    w, batch = loaded(), Batch.random(3)
    expected = w.forward(*batch.args)
    given = Batch(*(t.clone() for t in batch.args))
    w.submit_forward(*given.args)
    given.hidden.fill_(float("nan"))
    given.ids.fill_(-1)
    given.weights.zero_()
    w.gpu_experts_mask.fill_(True)
    assert torch.equal(w.sync_forward(given.hidden), expected)
    assert not w.forward(*batch.args).any()
    assert w.mask_epoch == 1 and len(small_calls) == 3


def test_outputs_are_the_callers_own() -> None:
    w = loaded()
    batches = [Batch.random(1, seed=seed) for seed in range(4)]
    outputs = [w.forward(*batch.args) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        assert torch.equal(output, long_way(w, batch))


def test_layers_under_way_at_the_same_time(small_calls: list[int]) -> None:
    layers = [loaded(layer_idx=index) for index in range(3)]
    batches = [Batch.random(2, seed=seed) for seed in range(3)]
    for w, batch in zip(layers, batches, strict=True):
        w.submit_forward(*batch.args)
    for w, batch in reversed(list(zip(layers, batches, strict=True))):
        assert torch.equal(w.sync_forward(batch.hidden), long_way(w, batch))
    assert small_calls == [2, 2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: Batch(torch.stack([b.hidden] * 2, 2)[:, :, 1], b.ids, b.weights),
        lambda b: Batch(b.hidden, b.ids, b.weights.to(torch.bfloat16)),
        lambda b: Batch(b.hidden, b.ids.to(torch.int32), b.weights),
        lambda b: Batch(torch.nn.Parameter(b.hidden, requires_grad=False), b.ids, b.weights),
    ],
)
def test_tensors_that_take_the_long_way(change: Any, small_calls: list[int]) -> None:
    w, batch = loaded(), Batch.random(1)
    batch.weights = batch.weights.to(torch.bfloat16).float()
    assert torch.equal(w.forward(*change(batch).args), w.forward(*batch.args))
    assert small_calls == [1]


def test_faults(small_calls: list[int]) -> None:
    batch = Batch.random(1)
    batch.ids[0] = torch.tensor([-1, E, 2])
    lenient, strict = loaded(), loaded(strict=True)
    lenient.forward(*batch.args)
    assert lenient.ignored_ids == 2
    strict.submit_forward(*batch.args)
    with pytest.raises(IndexError, match="2 of the ids in topk_ids are outside"):
        strict.sync_forward(batch.hidden)
    partial = loaded(num_gpu_experts=3)
    partial.gpu_experts_mask[2] = False
    partial.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match="routed to expert 2"):
        partial.sync_forward(batch.hidden)
    partial.gpu_experts_mask[2] = True
    assert not partial.forward(*batch.args).any()
    assert len(small_calls) == 4


def test_calls_out_of_order(small_calls: list[int]) -> None:
    w, batch = loaded(), Batch.random(1)
    w.submit_forward(*batch.args)
    for wrong, error in ((torch.zeros(2, H), ValueError), ("hidden", TypeError)):
        with pytest.raises(error):
            w.sync_forward(wrong)  # type: ignore[arg-type]
    w.sync_forward(batch.hidden)
    with pytest.raises(RuntimeError, match="has no submission"):
        w.sync_forward(batch.hidden)
    w.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match="has a submission already"):
        w.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match="has no submission"):
        w.sync_forward(batch.hidden)
    w.submit_forward(*batch.args)
    w.close()
    assert small_calls == [1, 1, 1] and batch.ids.shape[1] == K
