"""`from_pretrained`: tensors that are missing, too many or of another shape, and bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.registration import from_pretrained
from tests.hybrid_moe.checkpoints import edit_config, edit_tensors, save
from tests.hybrid_moe.integrations.loading_cases import load
from tests.hybrid_moe.tiny_models import build, logits, prompt

UNUSED = [
    "model.layers.0.self_attn.k_proj.k_scale",
    "model.layers.1.self_attn.v_proj.v_scale",
    "model.layers.1.self_attn.attn.q_scale",
    "model.layers.1.self_attn.prob_output_scale",
    "model.layers.0.self_attn.k_proj.output_scale",
    "model.layers.0.self_attn.kv_scale",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
]


@pytest.mark.parametrize("key", UNUSED)
def test_a_tensor_that_is_not_needed_is_noticed(
    qwen: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(load(qwen), prompt())
    edit_tensors(qwen, add={key: torch.ones(1)})
    caplog.clear()
    assert torch.equal(logits(load(qwen), prompt()), expected)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("hybrid_moe")]
    assert "inv_freq" in key or any(key in text for text in said)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight_zero_point",
        "model.layers.1.mlp.experts.3.up_proj.surprise.weight",
        "model.layers.1.mlp.experts.surprise",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.self_attn.attn_scale",
        "model.layers.0.mlp.k_scale",
        "model.layers.2.input_layernorm.weight",
    ],
)
def test_a_tensor_that_may_change_the_meaning_is_refused(qwen: Path, key: str) -> None:
    edit_tensors(qwen, add={key: torch.ones(1)})
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(qwen)


def test_a_tensor_without_a_place_is_named(qwen: Path) -> None:
    edit_tensors(qwen, add={"model.layers.0.mlp.surprise.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no place for: .*layers\.0\.mlp\.surprise"):
        load(qwen)


def test_experts_of_a_layer_too_many_are_named(qwen: Path) -> None:
    edit_config(qwen, num_hidden_layers=1, layer_types=None)
    with pytest.raises(CheckpointError, match=r"no place for: .*layers\.1\."):
        load(qwen)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.0.mlp.experts.2.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(qwen: Path, key: str) -> None:
    edit_tensors(qwen, drop=key)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(qwen)


def test_a_tensor_of_another_shape_is_named(qwen: Path) -> None:
    key = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(qwen, drop=key)
    edit_tensors(qwen, add={key: torch.zeros(64, 32, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"another shape .*self_attn\.o_proj\.weight"):
        load(qwen)


@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 9), ("moe_intermediate_size", 128), ("hidden_size", 96)]
)
def test_experts_that_the_config_does_not_describe(qwen: Path, name: str, value: int) -> None:
    edit_config(qwen, **{name: value})
    with pytest.raises(CheckpointError):
        load(qwen)


def test_biases_must_be_there(tmp_path: Path) -> None:
    directory = save(build("gpt_oss"), tmp_path)
    for layer in (0, 1):
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            edit_tensors(directory, drop=f"model.layers.{layer}.mlp.experts.{name}")
    with pytest.raises(CheckpointError):
        load(directory)


def test_bad_arguments(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load(qwen / "config.json")
    with pytest.raises(ValueError, match="unknown method 'INT3'"):
        load(qwen, "INT3")
    with pytest.raises(ValueError, match="threads"):
        from_pretrained(qwen, threads=100_000)
    with pytest.raises(ValueError, match="experts_implementation"):
        load(qwen, experts_implementation="eager")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    save(transformers.LlamaForCausalLM(config), tmp_path)
    with pytest.raises(CheckpointError, match="no routed experts"):
        load(tmp_path)
