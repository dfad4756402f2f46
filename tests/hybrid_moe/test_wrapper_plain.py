"""Plain CPU tensors: read where they are, by compiled code, and the same bits as of any others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.job import Batch as Addresses
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.tuning import INLINE_ENCODE_TOKENS
from hybrid_moe.runtime.call import is_plain
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, H, Weights, wrapper

WEIGHTS = Weights.random()


SIZES = (0, 1, INLINE_ENCODE_TOKENS, INLINE_ENCODE_TOKENS + 1, 64)
"""Rows are encoded in submit up to some number of tokens, and copied for the workers beyond."""


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Where the hidden states, ids and weights are that compiled code was given."""
    calls: list[tuple[int, int, int]] = []
    real = ExpertLayer.start

    def start(self: ExpertLayer, batch: Addresses, output: Any) -> Any:
        calls.append((batch.x, batch.ids, batch.weights))
        return real(self, batch, output)

    monkeypatch.setattr(ExpertLayer, "start", start)
    return calls


def addresses(batch: Batch) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in batch.args)


def loaded(**arguments: Any) -> KTMoEWrapper:
    return WEIGHTS.load(wrapper(**arguments))


def converted(w: KTMoEWrapper, batch: Batch) -> torch.Tensor:
    """The same batch as int32 ids, which must be converted first."""
    return w.forward(batch.hidden, batch.ids.to(torch.int32), batch.weights)


@pytest.mark.parametrize("threads", [1, 2])
def test_plain_tensors_are_read_where_they_are(
    threads: int, inputs: list[tuple[int, int, int]]
) -> None:
    w = loaded(cpuinfer_threads=threads)
    w.gpu_experts_mask[2] = True
    for tokens in SIZES:
        batch = Batch.random(tokens, seed=tokens)
        inputs.clear()
        assert torch.equal(w.forward(*batch.args), converted(w, batch))
        (first, second) = inputs
        assert first == addresses(batch)
        assert tokens == 0 or second[1] != first[1]


@pytest.mark.parametrize("tokens", SIZES)
def test_inputs_and_mask_are_captured_by_submit(tokens: int) -> None:
    w, batch = loaded(), Batch.random(tokens)
    expected = w.forward(*batch.args)
    given = Batch(*(t.clone() for t in batch.args))
    w.submit_forward(*given.args)
    given.hidden.fill_(float("nan"))
    given.ids.fill_(-1)
    given.weights.zero_()
    w.gpu_experts_mask.fill_(True)
    assert torch.equal(w.sync_forward(given.hidden), expected)
    assert not w.forward(*batch.args).any()
    assert w.mask_epoch == 1


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_without_an_expert_here_give_zeros(threads: int, tokens: int) -> None:
    """Whatever the memory of the output holds before."""
    w, batch = loaded(cpuinfer_threads=threads), Batch.random(tokens)
    assert tokens == 0 or w.forward(*batch.args).any()
    w.gpu_experts_mask.fill_(True)
    for _ in range(3):
        full = torch.full_like(batch.hidden, float("nan"))  # what the next output may lie on
        del full
        output = w.forward(*batch.args)
        assert output.shape == batch.hidden.shape and not output.any()


def test_outputs_are_the_callers_own() -> None:
    w = loaded()
    batches = [Batch.random(1, seed=seed) for seed in range(4)]
    outputs = [w.forward(*batch.args) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        assert torch.equal(output, converted(w, batch))


@pytest.mark.parametrize("tokens", SIZES[1:])
def test_layers_under_way_at_the_same_time(tokens: int) -> None:
    layers = [loaded(layer_idx=index) for index in range(3)]
    batches = [Batch.random(tokens, seed=seed) for seed in range(3)]
    for w, batch in zip(layers, batches, strict=True):
        w.submit_forward(*batch.args)
    for w, batch in reversed(list(zip(layers, batches, strict=True))):
        assert torch.equal(w.sync_forward(batch.hidden), converted(w, batch))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: Batch(torch.stack([b.hidden] * 2, 2)[:, :, 1], b.ids, b.weights),
        lambda b: Batch(b.hidden, b.ids, b.weights.to(torch.bfloat16)),
        lambda b: Batch(b.hidden, b.ids.to(torch.int32), b.weights),
        lambda b: Batch(torch.nn.Parameter(b.hidden, requires_grad=False), b.ids, b.weights),
    ],
)
def test_tensors_that_are_not_plain(change: Any, inputs: list[tuple[int, int, int]]) -> None:
    w, batch = loaded(), Batch.random(3)
    batch.weights = batch.weights.to(torch.bfloat16).float()
    changed = change(batch)
    assert not is_plain(*changed.args, w.shape) and is_plain(*batch.args, w.shape)
    assert torch.equal(w.forward(*changed.args), w.forward(*batch.args))
    assert inputs[1] == addresses(batch)


@pytest.mark.parametrize("tokens", SIZES[1:])
def test_faults(tokens: int) -> None:
    batch = Batch.random(tokens)
    batch.ids[:] = 2
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


def test_calls_out_of_order() -> None:
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
