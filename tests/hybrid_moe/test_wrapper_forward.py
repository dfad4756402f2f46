"""submit, sync and forward on CPU tensors: what is accepted, captured, skipped and refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_moe import wrapper as wrapper_module
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, H, K, Weights, wrapper
from tests.hybrid_moe.fake_layer import FakeExpertLayer
from tests.reference import assert_within

WEIGHTS = Weights.random(bias=True)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper_module, "ExpertLayer", FakeExpertLayer)


def loaded(**arguments: Any) -> KTMoEWrapper:
    return WEIGHTS.load(wrapper(**arguments))


def check(output: torch.Tensor, batch: Batch, **options: Any) -> None:
    assert output.dtype == torch.bfloat16
    assert_within(output.double().numpy(), WEIGHTS.expected(batch, **options))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("stream", [{}, {"cuda_stream": 0}, {"cuda_stream": None}])
def test_forward(tokens: int, stream: dict[str, Any]) -> None:
    batch = Batch.random(tokens)
    check(loaded().forward(*batch.args, **stream), batch)


def test_more_tokens_than_chunked_prefill_size() -> None:
    batch = Batch.random(40)
    check(loaded(chunked_prefill_size=8).forward(*batch.args), batch)


@pytest.mark.parametrize("options", [{"limit": 0.5}, {"limit": 0.5, "alpha": 1.702}])
def test_activation_options(options: dict[str, float]) -> None:
    batch = Batch.random()
    w = loaded(**{f"swiglu_{name}": value for name, value in options.items()})
    check(w.forward(*batch.args), batch, **options)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_of_the_routing(ids: torch.dtype, weights: torch.dtype) -> None:
    batch = Batch.random()
    batch = Batch(batch.hidden, batch.ids.to(ids), batch.weights.to(weights))
    check(loaded().forward(*batch.args), batch)


def test_strided_inputs() -> None:
    batch = Batch.random()
    strided = [torch.stack([t, t], dim=2)[:, :, 1] for t in batch.args]
    assert not any(t.is_contiguous() for t in strided)
    check(loaded().forward(*strided), batch)
    transposed = [t.t().contiguous().t() for t in batch.args]
    check(loaded().forward(*transposed), batch)


def test_inputs_are_captured_by_submit() -> None:
    w, batch = loaded(), Batch.random()
    given = Batch(*(t.clone() for t in batch.args))
    w.submit_forward(*given.args, 0)
    given.hidden.fill_(float("nan"))
    given.ids.fill_(-1)
    given.weights.zero_()
    check(w.sync_forward(given.hidden, 0), batch)


def test_output_belongs_to_the_caller() -> None:
    w, batch = loaded(), Batch.random()
    first = w.forward(*batch.args)
    kept = first.clone()
    second = w.forward(batch.hidden * 2, batch.ids, batch.weights)
    assert torch.equal(first, kept) and not torch.equal(second, kept)
    assert second.data_ptr() not in (first.data_ptr(), batch.hidden.data_ptr())


def test_ids_that_are_nobodys_are_zero_and_counted() -> None:
    w, batch = loaded(), Batch.random()
    batch.ids[0] = -1
    batch.ids[1, 0], batch.ids[2, 1] = E, -(2**40)
    y = w.forward(*batch.args)
    check(y, batch)
    assert not y[0].any()
    assert w.ignored_ids == K + 2
    w.forward(*batch.args)
    assert w.ignored_ids == 2 * (K + 2)


def test_strict_ids() -> None:
    w, batch = loaded(strict=True), Batch.random()
    check(w.forward(*batch.args), batch)
    bad = batch.ids.clone()
    bad[0, 0], bad[1, 2] = -1, E
    w.submit_forward(batch.hidden, bad, batch.weights)
    with pytest.raises(IndexError, match=r"2 of the ids in topk_ids are outside 0\.\.7"):
        w.sync_forward(batch.hidden)
    check(w.forward(*batch.args), batch)


def test_an_error_does_not_keep_the_weights() -> None:
    """A wrapper is gone with its last reference, whatever it has raised before."""
    w, batch = loaded(strict=True, num_gpu_experts=1), Batch.random()
    for bad in (batch.ids - E, batch.ids * 0):
        with pytest.raises((IndexError, RuntimeError)):
            w.forward(batch.hidden, bad, batch.weights)
        w.gpu_experts_mask[0] = False
    with pytest.raises(TypeError):
        w.forward(batch.hidden.float(), batch.ids, batch.weights)
    seen = weakref.ref(w)
    gc.disable()
    try:
        del w
        assert seen() is None
    finally:
        gc.enable()


def test_mask_skips_experts_and_is_live() -> None:
    w, batch = loaded(), Batch.random()
    check(w.forward(*batch.args), batch)
    mask = torch.arange(E) < 5
    address = w.gpu_experts_mask.data_ptr()
    w.gpu_experts_mask.copy_(mask)
    assert w.num_gpu_experts == 5
    check(w.forward(*batch.args), batch, skip=mask.numpy())
    w.gpu_experts_mask = torch.zeros(E, dtype=torch.bool)
    check(w.forward(*batch.args), batch)
    assert w.gpu_experts_mask.data_ptr() == address
    assert w.ignored_ids == 0


@pytest.mark.parametrize("given", [None, torch.zeros(E, dtype=torch.bool)])
@pytest.mark.parametrize("made_in, changed_in", [(True, False), (False, True)])
def test_mask_may_be_changed_in_and_out_of_inference_mode(
    given: torch.Tensor | None, made_in: bool, changed_in: bool
) -> None:
    with torch.inference_mode(made_in):
        w = loaded(gpu_experts_mask=None if given is None else given.clone())
    batch, mask = Batch.random(), torch.arange(E) < 3
    with torch.inference_mode(changed_in):
        w.gpu_experts_mask = mask
        check(w.forward(*batch.args), batch, skip=mask.numpy())
        w.gpu_experts_mask[0] = False
    mask[0] = False
    assert w.gpu_experts_mask.tolist() == mask.tolist()


def test_mask_is_read_when_submitted() -> None:
    w, batch = loaded(), Batch.random()
    w.submit_forward(*batch.args)
    w.gpu_experts_mask.fill_(True)
    check(w.sync_forward(batch.hidden), batch)


def test_expert_that_is_nowhere_is_an_error_where_it_is_used() -> None:
    w, batch = loaded(num_gpu_experts=2), Batch.random()
    w.gpu_experts_mask[1] = False
    ids = torch.tensor([[2, 3, 0], [1, 4, 5]])
    batch = Batch(batch.hidden[:2], ids, batch.weights[:2])
    w.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match=r"routed to expert 1, which .* was not loaded"):
        w.sync_forward(batch.hidden)
    batch.ids[1, 0] = 6
    skip = (torch.arange(E) < 2).numpy()
    check(w.forward(*batch.args), batch, skip=skip)


def test_two_layers_may_be_under_way() -> None:
    first, second = loaded(), loaded(layer_idx=1)
    one, other = Batch.random(seed=3), Batch.random(4, seed=4)
    first.submit_forward(*one.args)
    second.submit_forward(*other.args)
    check(second.sync_forward(other.hidden), other)
    check(first.sync_forward(one.hidden), one)


def test_order_of_calls() -> None:
    batch = Batch.random()
    fresh = wrapper(layer_idx=9)
    for call in (
        lambda: fresh.forward(*batch.args),
        lambda: fresh.submit_forward(*batch.args),
        lambda: fresh.sync_forward(batch.hidden),
    ):
        with pytest.raises(RuntimeError, match="layer 9 has no weights: call load_weights"):
            call()
    w = loaded()
    with pytest.raises(RuntimeError, match="no submission: call submit_forward"):
        w.sync_forward(batch.hidden)
    w.submit_forward(*batch.args)
    with pytest.raises(ValueError, match=r"shape \(4, 64\) on cpu, but \(5, 64\) on cpu was"):
        w.sync_forward(batch.hidden[:4])
    with pytest.raises(ValueError, match=r"on meta, but \(5, 64\) on cpu was submitted"):
        w.sync_forward(batch.hidden.to("meta"))
    check(w.sync_forward(batch.hidden), batch)
    w.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match="has a submission already: call sync_forward"):
        w.submit_forward(*batch.args)
    with pytest.raises(RuntimeError, match="no submission: call submit_forward"):
        w.sync_forward(batch.hidden)  # it was dropped
    check(w.forward(*batch.args), batch)


def test_worker_error_reaches_the_caller_and_leaves_the_layer_usable() -> None:
    w, batch = loaded(), Batch.random()
    layer: Any = w._layer
    layer.failure = "worker 1 failed"
    with pytest.raises(RuntimeError, match="worker 1 failed"):
        w.forward(*batch.args)
    layer.failure = None
    check(w.forward(*batch.args), batch)


def test_close() -> None:
    w, batch = loaded(), Batch.random()
    layer: Any = w._layer
    w.submit_forward(*batch.args)
    w.close()
    assert layer.closed and layer.jobs[0].waited
    w.close()
    pointers = [[1], [1], [1], [1]]
    for call in (
        lambda: w.forward(*batch.args),
        lambda: w(*batch.args),
        lambda: w.submit_forward(*batch.args),
        lambda: w.sync_forward(batch.hidden),
        lambda: WEIGHTS.load(w),
        w.load_weights,
        lambda: w.select_deferred_experts(batch.ids, batch.weights, 1),
        lambda: w.submit_write_weight_scale_to_buffer(1, 0, *pointers),
        w.sync_write_weight_scale_to_buffer,
    ):
        for _ in range(2):  # the first refusal opens nothing
            with pytest.raises(RuntimeError, match="layer 0 is closed and its weights are freed"):
                call()
    w.reset()
    assert not w.loaded and w.nbytes == 0 and w.layer_idx == 0
    unloaded = wrapper(layer_idx=5)
    unloaded.close()
    with pytest.raises(RuntimeError, match="layer 5 is closed"):
        WEIGHTS.load(unloaded)


def test_close_and_reset_with_a_job_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    """What is dropped raises nothing: it is logged, and the weights are freed all the same."""
    for end in (KTMoEWrapper.reset, KTMoEWrapper.close):
        w, batch = loaded(), Batch.random()
        layer: Any = w._layer
        w.submit_forward(*batch.args)
        layer.failure = "worker 1 failed"
        caplog.clear()
        end(w)
        assert "layer 0: a job that was dropped had failed: worker 1 failed" in caplog.text
        assert layer.closed == (end is KTMoEWrapper.close)


Change = Callable[[Batch], Batch]
BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "float16": (
        lambda b: replace(b, hidden=b.hidden.half()),
        TypeError,
        r"float16, must be torch.bfloat16: pass hidden_states.to\(torch.bfloat16\)",
    ),
    "float32": (
        lambda b: replace(b, hidden=b.hidden.float()),
        TypeError,
        "hidden_states has dtype torch.float32",
    ),
    "hidden array": (
        lambda b: replace(b, hidden=b.hidden.float().numpy()),
        TypeError,
        "hidden_states must be a tensor, not ndarray",
    ),
    "hidden list": (
        lambda b: replace(b, hidden=[1.0]),
        TypeError,
        "hidden_states must be a tensor, not list",
    ),
    "hidden size": (
        lambda b: replace(b, hidden=b.hidden[:, :32]),
        ValueError,
        r"hidden_states has shape \(5, 32\), must be \(tokens, 64\): hidden_size is 64",
    ),
    "hidden 1-d": (lambda b: replace(b, hidden=b.hidden[0]), ValueError, r"shape \(64,\)"),
    "hidden 3-d": (lambda b: replace(b, hidden=b.hidden[None]), ValueError, r"\(1, 5, 64\)"),
    "float ids": (
        lambda b: replace(b, ids=b.ids.float()),
        TypeError,
        "topk_ids has dtype torch.float32, must be torch.int64 or torch.int32",
    ),
    "int16 ids": (lambda b: replace(b, ids=b.ids.short()), TypeError, "topk_ids has dtype"),
    "bool ids": (lambda b: replace(b, ids=b.ids > 0), TypeError, "topk_ids has dtype torch.bool"),
    "k": (
        lambda b: replace(b, ids=b.ids[:, :2]),
        ValueError,
        r"topk_ids has shape \(5, 2\), must be \(5, 3\)",
    ),
    "tokens of weights": (
        lambda b: replace(b, weights=b.weights[:4]),
        ValueError,
        r"topk_weights has shape \(4, 3\), must be \(5, 3\)",
    ),
    "int weights": (
        lambda b: replace(b, weights=b.weights.long()),
        TypeError,
        "topk_weights has dtype torch.int64, must be a float type",
    ),
    "device of ids": (
        lambda b: replace(b, ids=b.ids.to("meta")),
        ValueError,
        "topk_ids is on meta, must be on cpu like hidden_states",
    ),
    "device": (
        lambda b: Batch(*(t.to("meta") for t in b.args)),
        ValueError,
        "hidden_states is on meta, must be on the CPU or a CUDA GPU",
    ),
    "gradient": (
        lambda b: replace(b, hidden=b.hidden.clone().requires_grad_()),
        RuntimeError,
        "no gradient: call under torch.inference_mode",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name: str) -> None:
    change, error, message = BAD[name]
    w, batch = loaded(), Batch.random()
    bad = change(batch)
    for call in (w.submit_forward, w.forward):
        with pytest.raises(error, match=message):
            call(*bad.args)
    with torch.inference_mode():
        check(w.forward(*batch.args), batch)


def test_gradients_switched_off() -> None:
    w, batch = loaded(), Batch.random()
    with torch.no_grad():
        y = w.forward(batch.hidden.clone().requires_grad_(), batch.ids, batch.weights)
    check(y, batch)
    assert y.shape == (5, H)
