"""Cache layers that grow: what Transformers' own layers hold and answer, after any use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
)

from hybrid_moe.integrations.transformers.step import growing_cache as module
from hybrid_moe.integrations.transformers.step.growing_cache import (
    GrowingLayer,
    GrowingWindowLayer,
    grow,
    growing_cache,
    use_cache,
)
from tests.hybrid_moe.tiny_models import FAMILIES, build, prompt

BATCH, HEADS, KEY_DIM, VALUE_DIM = 3, 2, 8, 4

updates = st.tuples(st.just("update"), st.integers(1, 40))
steps = st.lists(
    st.one_of(
        updates,
        updates,
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 4)),
        st.tuples(st.just("reorder"), st.permutations(range(BATCH))),
        st.tuples(st.just("select"), st.tuples(*[st.integers(0, BATCH - 1)] * BATCH)),
        st.tuples(st.just("repeat"), st.just(1)),
        st.tuples(st.just("record"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=30,
)  # fmt: skip


def states(tokens: int, generator: torch.Generator, dim: int) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, tokens, dim, generator=generator).bfloat16()


def apply(layer: Any, step: tuple[str, Any], keys: torch.Tensor, values: torch.Tensor) -> Any:
    """What a step returns, or the type of what it raises."""
    name, argument = step
    try:
        if name == "update":
            return layer.update(keys, values)
        if name == "crop":
            return layer.crop(-argument)
        if name == "reorder":
            return layer.reorder_cache(torch.tensor(argument))
        if name == "select":
            return layer.batch_select_indices(torch.tensor(argument))
        if name == "repeat":
            return layer.batch_repeat_interleave(argument)
        if name == "record":
            return layer.activate_past_recording() if layer.is_sliding else None
        return layer.reset()
    except (RuntimeError, AttributeError, IndexError) as error:
        return type(error)


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == theirs.get_max_length()
    for queries in (1, 5):
        assert ours.get_mask_sizes(queries) == theirs.get_mask_sizes(queries)
    assert ours.is_initialized == theirs.is_initialized
    if theirs.is_initialized and theirs.keys.numel():
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("window", [None, 2, 7, 64])
@settings(max_examples=25, deadline=None)
@given(steps=steps)
@torch.no_grad()
def test_content_and_answers(window: int | None, steps: list[tuple[str, Any]]) -> None:
    """With small blocks, so that memory grows and windows move often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 16)
        ours = GrowingLayer() if window is None else GrowingWindowLayer(window)
        theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        generator = torch.Generator().manual_seed(0)
        for step in steps:
            tokens = step[1] if step[0] == "update" else 1
            keys = states(tokens, generator, KEY_DIM)
            values = states(tokens, generator, VALUE_DIM)
            got, expected = (apply(layer, step, keys, values) for layer in (ours, theirs))
            if isinstance(expected, tuple):
                assert all(map(torch.equal, got, expected))
            else:
                assert got == expected
            assert_same(ours, theirs)


@torch.no_grad()
def test_a_step_copies_its_own_states_only() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8))
    at = layer.keys.data_ptr()
    for _ in range(20):
        keys, _ = layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        assert keys.data_ptr() == at


@torch.no_grad()
def test_a_window_that_moves_onto_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the front of the memory has no room beside it, new memory is taken: of one head, whose
    tokens adjoin, torch refuses to copy them onto themselves."""
    monkeypatch.setattr(module, "BLOCK", 16)
    ours, theirs = GrowingWindowLayer(17), DynamicSlidingWindowLayer(17)
    for tokens in (16, *[3] * 40):
        made = [torch.randn(1, 1, tokens, 8) for _ in range(2)]
        assert all(map(torch.equal, ours.update(*made), theirs.update(*made)))


@torch.no_grad()
def test_memory_of_a_window_is_bounded() -> None:
    layer = GrowingWindowLayer(100)
    for tokens in (5000, *[1] * 1000, 3000, *[1] * 300):
        layer.update(torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8))
        held = layer.keys.untyped_storage().nbytes() // (2 * 8 * 4)
        assert held <= 2 * 100 + module.BLOCK


@torch.no_grad()
def test_memory_written_in_inference_mode_is_not_written_outside() -> None:
    layer, states = GrowingLayer(), torch.randn(1, 2, 3, 8)
    with torch.inference_mode():
        layer.update(states.clone(), states.clone())
    keys, _ = layer.update(states, states)
    assert torch.equal(keys, torch.cat([states, states], 2))


def test_states_that_need_gradients_are_concatenated() -> None:
    layer, first = GrowingLayer(), torch.randn(1, 2, 3, 8, requires_grad=True)
    layer.update(first, first)
    keys, _ = layer.update(2 * first, first)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.full_like(first, 3))  # type: ignore[arg-type]


@torch.no_grad()
def test_other_sizes_and_dtypes_are_as_torch_has_them() -> None:
    layer = GrowingLayer()
    layer.update(torch.ones(1, 2, 3, 8).bfloat16(), torch.ones(1, 2, 3, 8).bfloat16())
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(torch.ones(2, 2, 1, 8).bfloat16(), torch.ones(2, 2, 1, 8).bfloat16())
    keys, _ = layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    assert keys.dtype == torch.float32


def test_layers_by_the_config() -> None:
    assert [type(layer) for layer in growing_cache(FAMILIES["gpt_oss"]()).layers] == [
        GrowingWindowLayer, GrowingLayer,
    ]  # fmt: skip
    mixed = DynamicCache(config=FAMILIES["qwen3_moe"]())
    mixed.layers[0] = kept = LinearAttentionLayer()
    assert grow(mixed).layers[0] is kept
    assert type(mixed.layers[1]) is GrowingLayer
    static = StaticCache(config=FAMILIES["qwen3_moe"](), max_cache_len=8)
    before = list(static.layers)
    assert grow(static).layers == before
    lazy = grow(DynamicCache())
    lazy.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    assert type(lazy.layers[0]) is GrowingLayer


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generate(family: str) -> None:
    """In float32, where both compute the same: beams, assisted decoding, a chat's history, past
    the window of 16."""
    ours, theirs = build(family, torch.float32), build(family, torch.float32)
    use_cache(ours)
    ids = torch.cat([prompt(20), prompt(20) + 1])
    common = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    beams = {**common, "max_new_tokens": 12, "num_beams": 3, "return_dict_in_generate": True}
    found = [model.generate(ids, **beams) for model in (ours, theirs)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert {type(layer) for layer in found[0].past_key_values.layers} <= {
        GrowingLayer, GrowingWindowLayer,
    }  # fmt: skip

    one = {**common, "max_new_tokens": 10, "return_dict_in_generate": True}
    one["attention_mask"] = torch.ones(1, 20)
    history = [model.generate(ids[:1], **one) for model in (ours, theirs)]
    helped = ours.generate(ids[:1], assistant_model=build(family, torch.float32), **one)
    assert torch.equal(helped.sequences, history[1].sequences)
    longer = torch.cat([history[1].sequences, ids[1:]], 1)
    one["attention_mask"] = torch.ones_like(longer)
    again = [
        model.generate(longer, past_key_values=before.past_key_values, **one)
        for model, before in zip((ours, theirs), history, strict=True)
    ]
    assert torch.equal(again[0].sequences, again[1].sequences)


def test_a_cache_that_is_passed_is_respected() -> None:
    model = build("qwen3_moe")
    use_cache(model)
    mine = DynamicCache(config=model.config)
    out = model.generate(
        prompt(), attention_mask=torch.ones(1, 6), max_new_tokens=2, pad_token_id=0,
        past_key_values=mine, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.past_key_values is mine
    assert type(mine.layers[0]) is DynamicLayer
    static = model.generate(
        prompt(), attention_mask=torch.ones(1, 6), max_new_tokens=2, pad_token_id=0,
        cache_implementation="static", disable_compile=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(static.past_key_values, transformers.StaticCache)
