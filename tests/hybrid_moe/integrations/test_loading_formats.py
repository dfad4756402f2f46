"""`from_pretrained`: each layer in the format it stores, and what else is quantised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.loading import (
    drop_experts_quantization,
    layer_index,
    rest_is_plain,
)
from hybrid_moe.integrations.transformers.registration import offload
from hybrid_moe.loaders import Checkpoint, convert_checkpoint
from tests.hybrid_moe.checkpoints import FILE, edit_config, edit_tensors, save, to_mxfp4
from tests.hybrid_moe.integrations.loading_cases import load, plain
from tests.hybrid_moe.tiny_models import FAMILIES, build, logits, prompt

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def only_layers(directory: Path, original: Path, layers: set[int]) -> None:
    """Put back the experts of all other layers as they were before `to_mxfp4`."""
    tensors, before = load_file(directory / FILE), load_file(original / FILE)

    def belongs(key: str) -> bool:
        return ".experts." not in key or layer_index(key) in layers

    kept = {key: tensor for key, tensor in tensors.items() if belongs(key)}
    kept |= {key: tensor for key, tensor in before.items() if not belongs(key)}
    save_file(kept, directory / FILE, {"format": "pt"})


@FAMILY
@pytest.mark.parametrize("quantized", [0, 1])
def test_each_layer_keeps_what_is_stored(family: str, quantized: int, tmp_path: Path) -> None:
    """MXFP4 in one layer, BF16 in the others: no bits are lost, whichever comes first."""
    bf16 = save(build(family), tmp_path / "bf16")
    mixed = to_mxfp4(save(build(family), tmp_path / "mixed"), family)
    only_layers(mixed, bf16, {quantized})
    model, reference = load(mixed, None), load(bf16, "BF16")
    fully = load(bf16, "MXFP4")
    formats = {}
    for name, module in reference.named_modules():
        if isinstance(module, HybridExperts):
            number = layer_index(name + ".")
            formats[number] = model.get_submodule(name).formats.name
            if (
                number == quantized
            ):  # the BF16 model with that layer quantised is what must come out
                module.layer = fully.get_submodule(name).layer
    assert formats == {n: "MXFP4" if n == quantized else "BF16" for n in formats}
    assert torch.equal(logits(model, prompt()), logits(reference, prompt()))
    assert torch.equal(logits(load(mixed, "STORED"), prompt()), logits(model, prompt()))
    assert torch.equal(logits(load(mixed, "MXFP4"), prompt()), logits(fully, prompt()))
    convert_checkpoint(mixed, tmp_path / "converted", progress=False, threads=1)
    converted = load(tmp_path / "converted", None)
    assert torch.equal(logits(converted, prompt()), logits(fully, prompt()))


@pytest.mark.parametrize("quantized", [0, 1])
def test_a_method_is_refused_before_anything_is_loaded(
    qwen: Path, quantized: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = to_mxfp4(save(build("qwen3_moe"), tmp_path / "mixed"), "qwen3_moe")
    only_layers(mixed, qwen, {quantized})
    monkeypatch.setattr("hybrid_moe.integrations.transformers.loading.load_skeleton", pytest.fail)
    with pytest.raises(ValueError, match=f"layer {quantized} of .* MXFP4, which does not become"):
        load(mixed, "BF16")
    # and so is a layer that lacks a scale, though the first one is whole
    key = f"model.layers.{quantized}.mlp.experts.5.up_proj.weight_scale"
    edit_tensors(mixed, drop=key)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(mixed, None)


def test_mxfp4_does_not_become_bf16(qwen: Path) -> None:
    with pytest.raises(ValueError, match="MXFP4"):
        load(to_mxfp4(qwen, "qwen3_moe"), "BF16")


def test_quantization_of_experts_is_not_transformers_business() -> None:
    config = FAMILIES["gpt_oss"]()
    for method in ("mxfp4", "quark", "fp8"):  # the name does not decide
        config.quantization_config = {"quant_method": method}
        drop_experts_quantization(config, only_experts=True)
        assert not hasattr(config, "quantization_config")
    config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    drop_experts_quantization(config, only_experts=False)
    kept = config.quantization_config
    assert kept == {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", ".experts"]}


def test_attention_in_fp8_is_left_to_transformers(tmp_path: Path) -> None:
    """DeepSeek-V4 as published: FP8 blocks of 128 x 128 beside MXFP4 experts."""
    directory = to_mxfp4(save(build("deepseek_v4"), tmp_path), "deepseek_v4")
    tensors = load_file(directory / FILE)
    for key in [key for key in tensors if re.search(r"\.attn\.(wq_a|wq_b|wkv|wo_b)\.weight$", key)]:
        rows, inputs = tensors[key].shape
        tensors[key] = (tensors[key].float() * 64).to(torch.float8_e4m3fn)
        scale = torch.full((-(-rows // 128), -(-inputs // 128)), 1 / 64)
        tensors[key.replace(".weight", ".scale")] = scale.to(torch.float8_e8m0fnu)
    save_file(tensors, directory / FILE, {"format": "pt"})
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }  # fmt: skip
    edit_config(directory, quantization_config=quantization, expert_dtype="fp4")
    assert not rest_is_plain(Checkpoint.open(directory))
    model, other = load(directory, None), plain(directory)
    offload(other, "MXFP4", threads=1, progress=False)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))


SKIPPED = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]
EXPERTS_ONLY = {
    "quark": ("weight", {"exclude": SKIPPED, "global_quant_config": {"weight": {"dtype": "fp4"}}}),
    "compressed-tensors": ("weight_packed", {"format": "mxfp4-pack-quantized", "ignore": SKIPPED}),
    "modelopt": ("weight", {"quant_algo": "W4A16_MXFP4"}),
    "fp8": ("weight", {"weight_block_size": [128, 128]}),
}


@pytest.mark.parametrize("method", EXPERTS_ONLY)
def test_what_is_stored_decides_not_the_method(method: str, qwen: Path, tmp_path: Path) -> None:
    """Experts in MXFP4 and everything else plain is ours to load, whoever wrote it."""
    suffix, more = EXPERTS_ONLY[method]
    expected = logits(load(qwen, "MXFP4"), prompt())
    directory = to_mxfp4(save(build("qwen3_moe"), tmp_path / method), "qwen3_moe")
    edit_config(directory, quantization_config={"quant_method": method, **more})
    tensors = load_file(directory / FILE)
    renamed = {
        f"{key.removesuffix('weight')}{suffix}" if key.endswith("_proj.weight") else key: tensor
        for key, tensor in tensors.items()
        if ".experts." in key
    }
    rest = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    save_file(rest | renamed, directory / FILE, {"format": "pt"})
    assert torch.equal(logits(load(directory, None), prompt()), expected)


@pytest.mark.parametrize(
    ("key", "dtype", "plain"),
    [
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.float32, True),
        ("model.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn, False),
        ("model.layers.0.self_attn.q_proj.qweight", torch.int32, False),
        ("model.layers.0.self_attn.q_proj.weight_packed", torch.uint8, False),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.float8_e4m3fn, True),
        ("model.layers.0.mlp.experts.0.up_proj.weight_scale", torch.uint8, True),
        ("mtp.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn, True),
        ("model.layers.0.mlp.gate.tid2eid", torch.int64, True),
    ],
)
def test_whether_the_rest_is_plain(qwen: Path, key: str, dtype: torch.dtype, plain: bool) -> None:
    edit_tensors(qwen, add={key: torch.zeros(64, 2).to(dtype)})
    assert rest_is_plain(Checkpoint.open(qwen)) is plain
