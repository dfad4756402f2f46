"""`from_pretrained`: a language model within a larger one, and draft layers that stay unread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hybrid_moe.integrations.transformers.registration import offload
from hybrid_moe.loaders import Checkpoint, inspect_checkpoint
from hybrid_moe.planning import read_model
from hybrid_moe.planning.kv_cache import transformers_cache
from tests.hybrid_moe.checkpoints import FILE, edit_config, edit_tensors, save, to_mxfp4
from tests.hybrid_moe.integrations.loading_cases import load, plain
from tests.hybrid_moe.tiny_models import build, logits, prompt


def test_draft_layers_of_their_own_name(qwen: Path) -> None:
    """`mtp.` says what it is, though Qwen3-MoE's class does not know it."""
    expected = logits(load(qwen), prompt())
    edit_tensors(qwen, add={"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(4)})
    assert torch.equal(logits(load(qwen), prompt()), expected)


def test_deepseek_v4_without_prefix_and_with_draft_layers(tmp_path: Path) -> None:
    """The published index: no `model.` before `layers.`, and `mtp.` layers that stay unread."""
    directory = to_mxfp4(save(build("deepseek_v4"), tmp_path), "deepseek_v4")
    expected = logits(load(directory, None), prompt())
    tensors = {k.removeprefix("model."): t for k, t in load_file(directory / FILE).items()}
    tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    save_file(tensors, directory / FILE, {"format": "pt"})
    assert torch.equal(logits(load(directory, None), prompt()), expected)


def composite() -> Any:
    """Qwen3.5-MoE as the hub has it: a language model beside a vision tower."""
    text = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": None, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
        "out_hidden_size": 64, "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("published", [True, False], ids=["published", "modules"])
def test_a_language_model_within_a_larger_model(published: bool, tmp_path: Path) -> None:
    composite().save_pretrained(tmp_path, save_original_format=published)
    tensors = load_file(tmp_path / FILE)
    last = "model.language_model.layers.2."
    draft = {k.replace(last, "mtp.layers.0."): t.clone() for k, t in tensors.items() if last in k}
    save_file(tensors | draft, tmp_path / FILE, {"format": "pt"})
    model, other = load(tmp_path), plain(tmp_path)
    offload(other, "BF16", threads=1, progress=False)
    assert type(model) is type(other)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))
    summary, planned = inspect_checkpoint(tmp_path), read_model(tmp_path)
    assert (summary.num_layers, summary.experts_per_token, summary.problems) == (3, 2, ())
    assert summary.parts["draft layers"] == sum(t.nbytes for t in draft.values())
    assert (len(planned.layers), planned.top_k) == (3, 2)
    (row,) = transformers_cache(planned.config, 8).rows
    assert (row.layers, row.heads) == (1, 2)


@pytest.fixture(params=[True, False], ids=["announced", "marked"])
def drafted(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """DeepSeek-V3 with a dense layer, three with experts, and a draft layer behind them."""
    config = transformers.DeepseekV3Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=128, bos_token_id=1, eos_token_id=None,
        pad_token_id=None, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=32, intermediate_size=64, moe_intermediate_size=96,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    save(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    draft = {
        key.replace(".layers.3.", ".layers.4."): tensor.clone()
        for key, tensor in tensors.items()
        if ".layers.3." in key
    }
    if request.param:
        edit_config(tmp_path, num_nextn_predict_layers=1)
    else:
        written = json.loads((tmp_path / "config.json").read_text())
        written.pop("num_nextn_predict_layers", None)
        (tmp_path / "config.json").write_text(json.dumps(written))
        draft["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(tensors | draft, tmp_path / FILE, {"format": "pt"})
    return tmp_path


def test_a_draft_layer_behind_the_last_one(drafted: Path) -> None:
    model, other = load(drafted), plain(drafted)
    offload(other, "BF16", threads=1, progress=False)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))
    summary, planned = inspect_checkpoint(drafted), read_model(drafted, dense="torch")
    assert (summary.moe_layers, summary.draft_layers) == ((1, 2, 3), (4,))
    experts = 3 * 4 * 3 * 96 * 64 * 2  # layers, experts, projections, weights, bytes
    assert summary.ram_experts["BF16"] == summary.parts["routed experts"] == experts
    assert [layer.layer for layer in planned.layers] == [1, 2, 3]
    tensors = load_file(drafted / FILE)
    draft = sum(t.nbytes for key, t in tensors.items() if ".layers.4." in key)
    assert planned.parts["draft layers"] == summary.parts["draft layers"] == draft
    assert planned.torch_bytes == sum(t.nbytes for t in tensors.values()) - draft - experts
    source = Checkpoint.open(drafted).layer(4)  # an engine with a draft model can still read it
    assert source.num_experts == 4
