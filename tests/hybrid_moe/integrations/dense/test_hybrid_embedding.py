"""Tied embeddings: rows of the output layer's strips, with their bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.embedding import (
    HybridEmbedding,
    refuse_resizing,
    why_not_tied,
)
from tests.hybrid_moe.integrations.dense.linear_cases import WHERE, Case, K, N, inputs
from tests.hybrid_moe.tiny_models import build, logits, prompt

IDS = torch.tensor([[0, N - 1, 5], [5, 64, 63]])


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_stored_bits(fmt: WeightFormat, dtype: torch.dtype) -> None:
    case = Case.random(fmt, dtype=dtype)
    embedding = HybridEmbedding(case.layer, "embed", padding_idx=5)
    plain = torch.nn.Embedding(N, K, padding_idx=5, _weight=case.weight.float().to(dtype))
    for ids in (IDS, IDS[0], IDS[0, 0], IDS.int(), IDS.t(), IDS[:0], torch.arange(N)):
        rows = embedding(ids)
        assert torch.equal(rows, plain(ids)) and rows.dtype == dtype
        assert rows.shape == (*ids.shape, K) and not rows.requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(mode: Any) -> None:
    embedding = HybridEmbedding(Case.random().layer, "embed")
    want = embedding(IDS)
    with mode():
        assert torch.equal(embedding(IDS), want)
    assert embedding(IDS.to("meta")).shape == (2, 3, K)


def test_it_is_an_embedding_with_the_layer_s_weight() -> None:
    layer = Case.random().layer
    embedding = HybridEmbedding(layer, "embed", padding_idx=3)
    assert isinstance(embedding, torch.nn.Embedding) and embedding.weight is layer.weight
    assert (embedding.num_embeddings, embedding.embedding_dim) == (N, K)
    assert repr(embedding) == f"HybridEmbedding({N}, {K}, padding_idx=3, rows of {WHERE})"


@pytest.mark.parametrize("ids", [[-1], [N], [0, N + 5]])
def test_ids_that_no_row_has(ids: list[int]) -> None:
    embedding = HybridEmbedding(Case.random().layer, "embed")
    with pytest.raises(IndexError, match=rf"embed: rows .* of a matrix of {N} rows"):
        embedding(torch.tensor(ids))


@pytest.mark.parametrize("ids", [torch.ones(2), torch.ones(2, dtype=torch.bool), [1, 2], None])
def test_what_is_no_ids(ids: Any) -> None:
    with pytest.raises(TypeError, match="embed: ids must be an int32 or int64 tensor"):
        HybridEmbedding(Case.random().layer, "embed")(ids)


def test_the_two_stay_tied() -> None:
    model = torch.nn.ModuleDict({"head": Case.random().layer})
    model["embed"] = HybridEmbedding(model["head"], "embed")  # type: ignore[arg-type]
    twin: Any = copy.deepcopy(model)
    assert twin["embed"].weight is twin["head"].weight is not model["head"].weight
    other = Case.random(seed=1)
    twin.load_state_dict({"head.weight": other.weight, "embed.weight": other.weight})
    assert torch.equal(twin["embed"](IDS), other.weight.bfloat16()[IDS])
    assert torch.equal(twin["head"](inputs(2, K)), other.layer(inputs(2, K)))
    assert not torch.equal(model["embed"](IDS), twin["embed"](IDS))
    assert sum(1 for _ in model.parameters()) == 1


class Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 8


def _hooked() -> torch.nn.Module:
    embedding = torch.nn.Embedding(4, 4)
    embedding.register_forward_hook(lambda *_: None)
    return embedding


NOT_TIED = [
    (Scaled(4, 4), "is a Scaled, which may do more than look up rows"),
    (torch.nn.Embedding(4, 4, max_norm=1.0), "has a max_norm, which changes rows"),
    (_hooked(), "has hooks"),
    (torch.nn.Embedding(4, 4, padding_idx=1), None),
]


@pytest.mark.parametrize(("embedding", "reason"), NOT_TIED)
def test_who_is_left_to_torch(embedding: torch.nn.Module, reason: str | None) -> None:
    why = why_not_tied(embedding)
    assert why is None if reason is None else why is not None and why.startswith(reason)


def _tied(model: Any) -> Any:
    """The model's output layer and embedding packed, on one thread."""
    weight = model.lm_head.weight.detach()
    case = Case.random(rows=weight.shape[0], inputs=weight.shape[1], where="lm_head")
    case.layer.load_state_dict({"weight": weight})
    model.lm_head = case.layer
    model.model.embed_tokens = HybridEmbedding(case.layer, "model.embed_tokens")
    return refuse_resizing(model)


def test_in_a_model_of_transformers() -> None:
    model = build("qwen3_moe")
    assert model.config.tie_word_embeddings
    plain = copy.deepcopy(model)
    want, hidden = logits(model, prompt()), plain.model(prompt()).last_hidden_state
    _tied(model)
    assert torch.equal(model.model(prompt()).last_hidden_state, hidden)
    assert torch.allclose(logits(model, prompt()), want, rtol=2**-7, atol=2**-7)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.tie_weights()
    model.to(torch.bfloat16).to("cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"mean_resizing": True}, {"mean_resizing": False}])
def test_resizing_is_refused_by_name(options: dict[str, bool]) -> None:
    model = _tied(build("qwen3_moe"))
    rows = model.config.vocab_size
    with pytest.raises(RuntimeError, match=f"has {rows} rows packed .* resized to {rows + 8}"):
        model.resize_token_embeddings(rows + 8, **options)
    with pytest.raises(RuntimeError, match="cannot be resized"):
        model.resize_token_embeddings(rows - 1, pad_to_multiple_of=100, **options)
    assert model.config.vocab_size == rows == model.lm_head.out_features
    for same in (rows, None):
        for each in (model, copy.deepcopy(model)):
            assert each.resize_token_embeddings(same) is each.get_input_embeddings()
    assert isinstance(model, transformers.PreTrainedModel)
