"""Clauses of submit_forward, sync_forward and forward."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from .kit import CHUNK, Batch, E, H, I, K, Kit, Weights, assert_close, write_checkpoint

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 33, CHUNK])
def test_result_is_the_weighted_sum_of_the_experts(kit: Kit, tokens: int) -> None:
    wrapper, batch = kit.load(), kit.batch(tokens)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


@pytest.mark.parametrize("tokens", [CHUNK + 1, 3 * CHUNK])
def test_tokens_beyond_chunked_prefill_size_are_computed(kit: Kit, tokens: int) -> None:
    """Padding to a graph's size and gathered batches exceed it."""
    wrapper, batch = kit.load(), kit.batch(tokens)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_chunked_prefill_size_of_minus_one_is_no_limit(kit: Kit) -> None:
    """SGLang's value where chunking is off."""
    wrapper, batch = kit.load(chunked_prefill_size=-1), kit.batch(9)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_batch_sizes_may_alternate(kit: Kit) -> None:
    wrapper = kit.load()
    for seed, tokens in enumerate((1, 7, 1, CHUNK, 0, 2, 7)):
        batch = kit.batch(tokens, seed)
        assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_integer_type(kit: Kit, dtype: torch.dtype) -> None:
    wrapper, batch = kit.load(), kit.batch(5)
    batch.ids = batch.ids.to(dtype)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_float_type(kit: Kit, dtype: torch.dtype) -> None:
    wrapper, batch = kit.load(), kit.batch(5)
    batch.weights = batch.weights.to(dtype)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_weights_are_applied_as_they_are(kit: Kit) -> None:
    """Not normalized, not scaled; zero and negative ones too."""
    wrapper, batch = kit.load(), kit.batch(4)
    batch.weights *= 3
    batch.weights[1] = 0
    batch.weights[2] *= -1
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_ids_of_minus_one_contribute_nothing(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(6)
    batch.ids[0] = -1
    batch.ids[1:4, 1] = -1
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_batch_of_nothing_but_minus_one_is_zero(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    batch.ids.fill_(-1)
    assert not kit.forward(wrapper, batch).any()


@pytest.mark.parametrize("id", [E, E + 1, 2**31 - 1, -(2**31), 2**40, -(2**63)])
def test_ids_out_of_range_contribute_nothing(kit: Kit, id: int) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    batch.ids[1, 0] = id
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_repeated_ids_in_one_token_are_added_each(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    batch.ids[:, 1] = batch.ids[:, 0]
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_all_tokens_on_one_expert(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(CHUNK)
    batch.ids.fill_(-1)
    batch.ids[:, 1] = 4
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_weights_of_skipped_slots_do_not_matter(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    batch.ids[:, 0] = -1
    expected = kit.weights[0].forward(batch)
    batch.weights[:, 0] = float("nan")
    assert_close(kit.forward(wrapper, batch), expected)


def test_nan_stays_in_its_row(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(5)
    expected = kit.weights[0].forward(batch)
    batch.hidden[2, 7] = float("nan")
    output = kit.forward(wrapper, batch)
    assert np.isnan(output[2]).any()
    others = [0, 1, 3, 4]
    assert_close(output[others], expected[others])


def test_row_of_zeros_gives_zeros(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    batch.hidden[1] = 0
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_accuracy_does_not_depend_on_the_size_of_the_input(kit: Kit, scale: float) -> None:
    wrapper, batch = kit.load(swiglu_limit=0.0), kit.batch(4)
    batch.hidden *= scale
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_swiglu_limit_clamps_gate_and_up(kit: Kit, limit: float) -> None:
    wrapper, batch = kit.load(swiglu_limit=limit), kit.batch(5)
    batch.hidden *= 4
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, limit=limit))


def test_swiglu_alpha_is_applied_or_refused(kit: Kit) -> None:
    """Silence would be another model's arithmetic."""
    options = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    try:
        wrapper = kit.load(**options)
    except Exception as error:
        pytest.skip(f"optional: refused with {error}")
    batch = kit.batch(5)
    expected = kit.weights[0].forward(batch, limit=7.0, alpha=1.702)
    assert_close(kit.forward(wrapper, batch), expected)


def test_strided_inputs(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(5)
    strided = Batch(*(torch.stack([t, t], dim=-1)[..., 0] for t in batch.args))
    assert not strided.hidden.is_contiguous()
    assert_close(kit.forward(wrapper, strided), kit.weights[0].forward(batch))


def test_inputs_are_not_written(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(4)
    before = [t.clone() for t in batch.args]
    kit.forward(wrapper, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, batch.args, strict=True))


CHANGES = {
    "hidden": lambda batch: batch.hidden.fill_(1e4),
    "ids_masked": lambda batch: batch.ids.fill_(-1),
    "ids_moved": lambda batch: batch.ids.copy_((batch.ids + 1) % E),
    "weights": lambda batch: batch.weights.zero_(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_inputs_may_be_changed_in_place_right_after_submit(
    kit: Kit, name: str, tokens: int
) -> None:
    """SGLang masks ids in place, and GPU experts may overwrite hidden."""
    wrapper = kit.load()
    for seed in range(5):
        batch = kit.batch(tokens, seed)
        expected = kit.weights[0].forward(batch)
        wrapper.submit_forward(*batch.args, kit.stream)
        CHANGES[name](batch)
        assert_close(kit.sync(wrapper, batch.hidden), expected)


def test_sync_takes_only_shape_and_device_from_its_tensor(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(4)
    wrapper.submit_forward(*batch.args, kit.stream)
    assert_close(kit.sync(wrapper, torch.empty_like(batch.hidden)), kit.weights[0].forward(batch))


def test_submit_returns_nothing(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(1)
    assert wrapper.submit_forward(*batch.args, kit.stream) is None
    kit.sync(wrapper, batch.hidden)


def test_forward_is_submit_and_sync(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(4)
    output = wrapper.forward(*batch.args, kit.stream)
    assert_close(output.double().cpu().numpy(), kit.weights[0].forward(batch))


@pytest.mark.parametrize("stream", [0, None])
def test_default_stream_may_be_given_as_zero_or_none(kit: Kit, stream: int | None) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    wrapper.submit_forward(*batch.args, stream)
    output = wrapper.sync_forward(batch.hidden, stream)
    assert_close(output.double().cpu().numpy(), kit.weights[0].forward(batch))


def test_result_outlives_the_next_layer(kit: Kit) -> None:
    """The buffer of a result may be used again two layers later, not earlier."""
    first, second = kit.load(layer_idx=0), kit.load(layer_idx=1)
    batch = kit.batch(3)
    output = first.forward(*batch.args, kit.stream)
    second.forward(*batch.args, kit.stream)
    assert_close(output.double().cpu().numpy(), kit.weights[0].forward(batch))


def test_result_may_be_written_by_the_caller(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    wrapper.forward(*batch.args, kit.stream).fill_(1e4)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_two_layers_may_be_under_way(kit: Kit) -> None:
    first, second = kit.load(layer_idx=0), kit.load(layer_idx=1)
    one, two = kit.batch(3, 1), kit.batch(3, 2)
    first.submit_forward(*one.args, kit.stream)
    second.submit_forward(*two.args, kit.stream)
    assert_close(kit.sync(first, one.hidden), kit.weights[0].forward(one))
    assert_close(kit.sync(second, two.hidden), kit.weights[1].forward(two))


def test_layers_run_in_turn_step_after_step(kit: Kit) -> None:
    wrappers = [kit.load(layer_idx=layer) for layer in range(4)]
    for step in range(4):
        for layer, wrapper in enumerate(wrappers):
            batch = kit.batch(1 + step % 2, 10 * step + layer)
            assert_close(kit.forward(wrapper, batch), kit.weights[layer].forward(batch))


def test_two_wrappers_of_one_layer_do_not_disturb_each_other(kit: Kit) -> None:
    one, two = kit.load(), kit.load(torch.arange(E).flip(0))
    for seed in range(3):
        batch = kit.batch(2, seed)
        assert_close(kit.forward(one, batch), kit.weights[0].forward(batch))
        expected = kit.weights[0].forward(batch, mapping=torch.arange(E).flip(0))
        assert_close(kit.forward(two, batch), expected)


def test_two_hidden_sizes_in_one_process(kit: Kit, tmp_path: Path) -> None:
    """A draft model beside the main one, with batches of the same size."""
    narrow = Weights.random(7, hidden=H // 2)
    write_checkpoint(tmp_path, [narrow])
    wide = kit.load()
    other = kit.load(weight_path=str(tmp_path), hidden_size=H // 2)
    for seed in range(2):
        batch, small = kit.batch(2, seed), kit.batch(2, seed, hidden=H // 2)
        assert_close(kit.forward(wide, batch), kit.weights[0].forward(batch))
        assert_close(kit.forward(other, small), narrow.forward(small))


def test_two_numbers_of_experts_per_token_in_one_process(kit: Kit) -> None:
    one, two = kit.load(), kit.load(num_experts_per_tok=K - 1)
    batch = kit.batch(2)
    fewer = Batch(batch.hidden, batch.ids[:, 1:].clone(), batch.weights[:, 1:].clone())
    for _ in range(2):
        assert_close(kit.forward(one, batch), kit.weights[0].forward(batch))
        assert_close(kit.forward(two, fewer), kit.weights[0].forward(fewer))


def test_wrapper_may_be_used_from_another_thread(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    results: list[np.ndarray] = []

    def run() -> None:
        with torch.inference_mode():
            results.append(kit.forward(wrapper, batch))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_close(results[0], kit.weights[0].forward(batch))


def test_wrapper_may_be_used_under_no_grad(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    with torch.inference_mode(False), torch.no_grad():
        plain = Batch(*(t.clone() for t in batch.args))
        assert_close(kit.forward(wrapper, plain), kit.weights[0].forward(batch))


def test_forgotten_wrapper_does_not_disturb_others(kit: Kit) -> None:
    kit.forward(kit.load(), kit.batch(2))
    kit.made.clear()
    wrapper, batch = kit.load(layer_idx=1), kit.batch(2)
    assert_close(kit.forward(wrapper, batch), kit.weights[1].forward(batch))


BAD_CALLS = {
    "hidden_too_wide": lambda x, i, w: (torch.zeros(3, H + 32, dtype=x.dtype), i, w),
    "hidden_too_narrow": lambda x, i, w: (x[:, : H // 2], i, w),
    "hidden_with_one_dimension": lambda x, i, w: (x[0], i, w),
    "hidden_with_three_dimensions": lambda x, i, w: (x[None], i, w),
    "too_few_rows_of_ids": lambda x, i, w: (x, i[:2], w),
    "too_few_rows_of_weights": lambda x, i, w: (x, i, w[:2]),
    "too_many_ids_per_token": lambda x, i, w: (x, i.repeat(1, 2), w.repeat(1, 2)),
    "too_few_ids_per_token": lambda x, i, w: (x, i[:, 1:], w[:, 1:]),
    "ids_that_are_no_tensor": lambda x, i, w: (x, i.tolist(), w),
    "hidden_that_is_no_tensor": lambda x, i, w: (None, i, w),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_shape_raises_and_the_layer_works_afterwards(kit: Kit, name: str) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    arguments = BAD_CALLS[name](*batch.args)
    with pytest.raises(Exception):  # noqa: B017 - any exception is an answer, a crash is not
        wrapper.submit_forward(*arguments, kit.stream)
        wrapper.sync_forward(arguments[0], kit.stream)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


ODD_DTYPES = {
    "hidden_float32": lambda x, i, w: (x.float(), i, w),
    "hidden_float16": lambda x, i, w: (x.half(), i, w),
    "hidden_int16": lambda x, i, w: (x.view(torch.int16), i, w),
    "ids_float": lambda x, i, w: (x, i.float(), w),
    "ids_int16": lambda x, i, w: (x, i.short(), w),
    "weights_int": lambda x, i, w: (x, i, w.to(torch.int64)),
}


@pytest.mark.parametrize("name", ODD_DTYPES)
def test_undocumented_dtype_is_converted_by_value_or_refused(kit: Kit, name: str) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    x, ids, weights = ODD_DTYPES[name](*batch.args)
    try:
        wrapper.submit_forward(x, ids, weights, kit.stream)
        output = wrapper.sync_forward(x, kit.stream)
    except Exception:
        assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))
    else:
        converted = Batch(x.to(torch.bfloat16), ids.to(torch.int64), weights.float())
        assert_close(output.double().cpu().numpy(), kit.weights[0].forward(converted))


def test_forward_before_load_raises(kit: Kit) -> None:
    wrapper, batch = kit.make(), kit.batch(1)
    with pytest.raises(Exception):  # noqa: B017
        kit.forward(wrapper, batch)
    wrapper.load_weights(torch.arange(E))
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_sync_without_submit_raises(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(1)
    with pytest.raises(Exception):  # noqa: B017
        wrapper.sync_forward(batch.hidden, kit.stream)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_sync_of_another_batch_size_raises(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    wrapper.submit_forward(*batch.args, kit.stream)
    with pytest.raises(Exception):  # noqa: B017
        wrapper.sync_forward(batch.hidden[:2], kit.stream)


def test_sizes_can_be_read_from_the_wrapper(kit: Kit) -> None:
    wrapper = kit.make()
    assert (wrapper.num_experts, wrapper.num_experts_per_tok) == (E, K)
    assert (wrapper.hidden_size, wrapper.moe_intermediate_size) == (H, I)
    assert wrapper.layer_idx == 0
