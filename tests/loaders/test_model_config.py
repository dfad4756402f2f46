"""`config.json` means what Transformers makes of it, with Transformers and without."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.drafts import DraftLayers
from hybrid_moe.loaders.model_config import (
    MAX_LAYERS,
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    ModelConfig,
)
from hybrid_moe.loaders.safetensors import SafetensorsIndex

WITHOUT = pytest.mark.parametrize("without", [False, True], ids=["with", "without"])
"""Transformers, which is an extra."""


@pytest.fixture
def _maybe_without(without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without:
        monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("_maybe_without")
@WITHOUT
@pytest.mark.parametrize(
    "raw",
    [
        {"num_experts_per_tok": 3},
        {"model_type": "qwen3_moe", "num_experts_per_tok": 3},
        {"model_type": "qwen3_moe", "num_experts_per_token": 3},
        {"model_type": "qwen3_moe", "moe_k": 3},
        {"model_type": "hunyuan_v1_moe", "moe_topk": [3, 3]},
        {"model_type": "unheard_of", "experts_per_token": 3},
        {"model_type": "qwen3_5_moe", "text_config": {"num_experts_per_tok": 3}},
        {"model_type": "x", "thinker_config": {"text_config": {"num_experts_per_tok": 3}}},
        {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {"moe_topk": 3}}},
        {"model_type": ["no", "name"], "num_experts_per_tok": 3},
    ],
    ids=json.dumps,
)
def test_experts_of_a_token(raw: dict[str, Any]) -> None:
    assert ModelConfig(raw).of_layer(TOP_K, 1) == 3


def test_a_number_for_each_layer() -> None:
    config = ModelConfig({"moe_topk": [1, 4], "num_experts": [8, 16]})
    assert [config.of_layer(TOP_K, layer) for layer in range(3)] == [1, 4, None]
    assert [config.of_layer(NUM_EXPERTS, layer) for layer in range(2)] == [8, 16]
    assert config.integer(TOP_K) is None


@pytest.mark.parametrize("damage", [{}, {"num_experts_per_tok": "2"}, {"moe_topk": True}])
def test_no_number(damage: dict[str, Any]) -> None:
    assert ModelConfig(damage).of_layer(TOP_K, 0) is None


def test_what_is_left_out_is_the_familys_default() -> None:
    config = ModelConfig({"model_type": "mixtral", "num_hidden_layers": 3})
    reference = transformers.MixtralConfig(num_hidden_layers=3)
    assert config.integer(TOP_K) == reference.num_experts_per_tok
    assert config.integer(NUM_EXPERTS) == reference.num_local_experts
    assert config.full["max_position_embeddings"] == reference.max_position_embeddings
    assert config.integer(("head_dim",)) == reference.head_dim
    assert config.integer(NUM_LAYERS) == 3


@pytest.mark.parametrize(
    "family",
    ["qwen3_next", "qwen3_5_moe_text", "jamba", "lfm2_moe", "gpt_oss", "minimax", "llama4_text",
     "granitemoehybrid"],
)  # fmt: skip
def test_layer_types_are_those_of_the_familys_class(family: str) -> None:
    raw = {"model_type": family, "num_hidden_layers": 8}
    if family == "granitemoehybrid":
        raw["layer_types"] = ["mamba", "attention"] * 4
    elif family == "lfm2_moe":
        raw["layer_types"] = ["conv", "full_attention"] * 4
    reference = transformers.CONFIG_MAPPING[family].from_dict(dict(raw))
    types = ModelConfig(raw).full["layer_types"]
    assert types == list(reference.layer_types) and len(types) == 8


@given(
    layers=st.integers(1, 70),
    interval=st.integers(1, 9),
    offset=st.integers(0, 8),
    by_interval=st.booleans(),
)
def test_our_own_rules_agree_with_the_families(
    layers: int, interval: int, offset: int, by_interval: bool
) -> None:
    raw: dict[str, Any] = {"num_hidden_layers": layers}
    if by_interval:
        raw["full_attention_interval"] = interval
    else:
        raw |= {"attn_layer_period": interval, "attn_layer_offset": offset % interval}
    own = ModelConfig(raw).full["layer_types"]
    family = "qwen3_next" if by_interval else "jamba"
    assert own == ModelConfig({"model_type": family, **raw}).full["layer_types"]


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        ({"model_type": "dbrx", "n_layers": 4}, 4),
        ({"model_type": "dbrx"}, None),
        ({"model_type": "mixtral", "num_hidden_layers": True}, None),
        ({"n_layers": 4}, None),
        # each of its layers is two by Transformers' count, one by the names of its tensors
        ({"model_type": "longcat_flash", "num_layers": 2}, None),
        ({"model_type": "qwen3_5_moe", "text_config": {"num_hidden_layers": 4}}, 4),
    ],
    ids=json.dumps,
)
def test_number_of_layers(raw: dict[str, Any], count: int | None) -> None:
    assert ModelConfig(raw).num_layers == count


@pytest.mark.parametrize("layers", ["many", None])
def test_a_file_that_the_family_rejects(layers: object, caplog: pytest.LogCaptureFixture) -> None:
    raw = {"model_type": "jamba", "num_hidden_layers": layers, "num_experts_per_tok": 2}
    config = ModelConfig(raw)
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        assert config.full == raw == config.full
    (record,) = caplog.records
    assert "model_type jamba" in record.getMessage()


@pytest.mark.parametrize("count", [MAX_LAYERS + 1, 10**30])
@pytest.mark.parametrize(
    "raw",
    [
        {"num_hidden_layers": None, "full_attention_interval": 4},
        {"model_type": "gpt_oss", "num_hidden_layers": None},
        # what the language model's part does not say is derived from the rest
        {"model_type": "gpt_oss", "num_hidden_layers": None, "text_config": {},
         "num_nextn_predict_layers": 1},
        {"model_type": "qwen3_5_moe", "text_config": {"num_hidden_layers": None}},
        {"vision_config": [{"depth": None}]},
        {"n_layer": None},
        {"num_layers": None},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_layers_that_would_fill_the_memory(raw: dict[str, Any], count: int) -> None:
    """They are refused before Transformers or our own rules make a list of them."""
    text = json.dumps(raw).replace("null", str(count))
    with pytest.raises(
        CheckpointError, match=rf"^config\.json of m .*={str(count)[:4]}.*no number"
    ):
        Checkpoint(SafetensorsIndex(Path("m"), {}), json.loads(text))


def test_large_numbers_that_are_not_of_layers() -> None:
    raw = {"num_hidden_layers": MAX_LAYERS, "vocab_size": 10**6, "layers": [0, 1, 9**9], "a": {}}
    assert ModelConfig(raw).num_layers == MAX_LAYERS


KEYS = [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in range(6)]
MARKED = [*KEYS, "model.layers.5.eh_proj.weight", "model.layers.2.enorm.weight"]


@pytest.mark.parametrize(
    ("raw", "keys", "numbers"),
    [
        ({"num_hidden_layers": 5, "num_nextn_predict_layers": 1}, KEYS, {5}),
        ({"num_hidden_layers": 4, "num_nextn_predict_layers": 1}, KEYS, {4}),
        ({"num_hidden_layers": 4, "num_mtp_modules": 10**12}, KEYS, {4, 5}),
        ({"num_hidden_layers": 4, "text_config": {"mtp_num_hidden_layers": 2}}, KEYS, set()),
        ({"text_config": {"num_hidden_layers": 4}, "num_mtp_layers": 2}, KEYS, {4, 5}),
        ({"num_hidden_layers": 5}, KEYS, set()),
        ({"num_hidden_layers": 5, "num_nextn_predict_layers": 0}, KEYS, set()),
        ({"num_hidden_layers": 5, "num_nextn_predict_layers": "1"}, KEYS, set()),
        # DeepSeek-V3's class has one by default: no announcement of this file
        ({"model_type": "deepseek_v3", "num_hidden_layers": 5}, KEYS, set()),
        ({"num_hidden_layers": 5}, MARKED, {5}),
        ({"num_hidden_layers": 6}, MARKED, set()),
        ({}, MARKED, {2, 5}),
        # nor does the class's number of layers say anything of this file
        ({"model_type": "deepseek_v3"}, MARKED, {2, 5}),
        ({}, KEYS, set()),
        # layers of another tower are no layers of the model
        ({"num_hidden_layers": 4, "num_nextn_predict_layers": 9}, ["visual.layers.4.w"], set()),
    ],
)
def test_draft_layers(raw: dict[str, Any], keys: list[str], numbers: set[int]) -> None:
    drafts = DraftLayers(ModelConfig(raw), keys)
    assert drafts.numbers == numbers
    assert {n for n in range(9) if n in drafts} == numbers
    owned = [key for key in keys if drafts.owns(key)]
    assert owned == [key for key in keys if int(key.split("layers.")[1].split(".")[0]) in numbers]


@pytest.mark.parametrize(
    ("key", "owned"),
    [
        ("mtp.0.ffn.experts.0.w1.weight", True),
        ("mtp.layers.0.mlp.up_proj.weight", True),
        ("model.mtp_block.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.smtp.weight", False),
    ],
)
def test_draft_layers_by_their_own_names(key: str, owned: bool) -> None:
    assert DraftLayers(ModelConfig({}), [key]).owns(key) is owned


@pytest.mark.usefixtures("_maybe_without")
@WITHOUT
def test_a_checkpoint_is_inspected(tmp_path: Path) -> None:
    """The same summary, whoever read the configuration."""
    from hybrid_moe.loaders import inspect_checkpoint

    example = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"
    summary = inspect_checkpoint(example)
    config = json.loads((example / "config.json").read_text())
    assert summary.experts_per_token == config["num_experts_per_tok"]
    assert summary.num_layers == config["num_hidden_layers"] and not summary.problems
