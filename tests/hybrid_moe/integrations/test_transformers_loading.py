"""`from_pretrained`: checkpoints of each family, what it reads, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.experts_module import describe, find_experts
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.loading import (
    drop_experts_quantization,
    experts_source,
    layer_index,
    rest_is_plain,
)
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload
from hybrid_moe.loaders import Checkpoint, convert_checkpoint, inspect_checkpoint
from hybrid_moe.planning import read_model
from hybrid_moe.planning.kv_cache import transformers_cache
from tests.families import write_family
from tests.hybrid_moe.checkpoints import FILE, edit_config, edit_tensors, save, to_mxfp4
from tests.hybrid_moe.tiny_models import FAMILIES, build, logits, prompt
from tests.loaders.test_families import assert_is_expert

FAMILY = pytest.mark.parametrize("family", FAMILIES)
METHOD = pytest.mark.parametrize("method", FORMATS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A checkpoint of the tiny Qwen3-MoE."""
    return save(build("qwen3_moe"), tmp_path / "qwen")


def load(directory: Path, method: str | None = "BF16", **kwargs: Any) -> Any:
    return from_pretrained(directory, method, threads=1, progress=False, **kwargs)


def plain(directory: Path) -> Any:
    """What Transformers makes of the checkpoint."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@FAMILY
@METHOD
def test_equals_offload_of_what_transformers_loads(
    family: str, method: str, tmp_path: Path
) -> None:
    directory = save(build(family), tmp_path)
    model, other = load(directory, method), plain(directory)
    offload(other, method, threads=1, progress=False)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))
    assert type(model) is type(other)
    assert model.state_dict().keys() == other.state_dict().keys()


@FAMILY
def test_published_mxfp4_equals_quantised_bf16(family: str, tmp_path: Path) -> None:
    directory = save(build(family), tmp_path / "bf16")
    expected = logits(load(directory, "MXFP4"), prompt())
    published = load(to_mxfp4(directory, family), None)
    assert torch.equal(logits(published, prompt()), expected)
    assert {m.fmt and m.fmt.name for m in hybrid_experts(published)} == {"MXFP4"}


@FAMILY
def test_converted_equals_quantised_bf16(family: str, tmp_path: Path) -> None:
    directory = save(build(family), tmp_path / "bf16")
    convert_checkpoint(directory, tmp_path / "mxfp4", "MXFP4", progress=False, threads=1)
    expected = logits(load(directory, "MXFP4"), prompt())
    assert torch.equal(logits(load(tmp_path / "mxfp4", None), prompt()), expected)


def test_draft_layers_of_their_own_name(qwen: Path) -> None:
    """`mtp.` says what it is, though Qwen3-MoE's class does not know it."""
    expected = logits(load(qwen), prompt())
    edit_tensors(qwen, add={"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(4)})
    assert torch.equal(logits(load(qwen), prompt()), expected)


def test_the_module_decides_where_gate_and_up_lie(tmp_path: Path) -> None:
    """Biased experts in halves, under the names of gpt-oss's alternating ones."""
    fixture = write_family("privacy_filter", tmp_path)
    (fixture.directory / "config.json").unlink()  # nobody else could tell
    model = transformers.AutoModelForTokenClassification.from_config(fixture.config)
    checkpoint = Checkpoint.open(fixture.directory)
    for name, module in find_experts(model).items():
        source = experts_source({}, checkpoint, name, describe(module, name))
        layer = fixture.layers[source.layer]
        for expert in range(fixture.num_experts):
            assert_is_expert(source.expert(expert), layer, expert)


def test_deepseek_v4_without_prefix_and_with_draft_layers(tmp_path: Path) -> None:
    """The published index: no `model.` before `layers.`, and `mtp.` layers that stay unread."""
    directory = to_mxfp4(save(build("deepseek_v4"), tmp_path), "deepseek_v4")
    expected = logits(load(directory, None), prompt())
    tensors = {k.removeprefix("model."): t for k, t in load_file(directory / FILE).items()}
    tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    save_file(tensors, directory / FILE, {"format": "pt"})
    assert torch.equal(logits(load(directory, None), prompt()), expected)


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
            formats[number] = model.get_submodule(name).fmt.name
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
    summary, planned = inspect_checkpoint(drafted), read_model(drafted)
    assert (summary.moe_layers, summary.draft_layers) == ((1, 2, 3), (4,))
    experts = 3 * 4 * 3 * 96 * 64 * 2  # layers, experts, projections, weights, bytes
    assert summary.ram_experts["BF16"] == summary.parts["routed experts"] == experts
    assert [layer.layer for layer in planned.layers] == [1, 2, 3]
    tensors = load_file(drafted / FILE)
    draft = sum(t.nbytes for key, t in tensors.items() if ".layers.4." in key)
    assert planned.parts["draft layers"] == summary.parts["draft layers"] == draft
    assert planned.bytes_16bit == sum(t.nbytes for t in tensors.values()) - draft - experts
    source = Checkpoint.open(drafted).layer(4)  # an engine with a draft model can still read it
    assert source.num_experts == 4


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


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def hybrid_experts(model: Any) -> Iterator[HybridExperts]:
    return (m for m in model.modules() if isinstance(m, HybridExperts))


class ExpertShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors with storage that have a dimension of the experts' intermediate size."""

    def __init__(self, intermediate: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes, self.count = {intermediate, 2 * intermediate}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.count += bool(self.sizes & set(tensor.shape))
        return result


def test_experts_never_pass_through_torch(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all of torch's work on this thread
    with ExpertShapes(intermediate=96) as control:
        plain(qwen)
    assert control.count > 0
    with ExpertShapes(intermediate=96) as seen:
        model = load(qwen)
    assert seen.count == 0
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


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


def test_mxfp4_does_not_become_bf16(qwen: Path) -> None:
    with pytest.raises(ValueError, match="MXFP4"):
        load(to_mxfp4(qwen, "qwen3_moe"), "BF16")


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


def test_layer_index() -> None:
    assert layer_index("model.layers.12.mlp.experts") == 12
    with pytest.raises(NotImplementedError, match="block"):
        layer_index("block.experts")


REGISTRATION = """
import sys
import hybrid_moe
assert "transformers" not in sys.modules and "torch" not in sys.modules, "the import is not lazy"
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS and "hybrid_moe" in ALL_FP8_EXPERTS_FUNCTIONS
"""

REGISTRATION_AFTER = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "hybrid_moe" not in ALL_EXPERTS_FUNCTIONS
import hybrid_moe
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS
from transformers.integrations import finegrained_fp8
assert "hybrid_moe" in finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
assert "exec_module" not in vars(finegrained_fp8.__spec__.loader), "the loader is not restored"
"""


@pytest.mark.parametrize("program", [REGISTRATION, REGISTRATION_AFTER])
def test_importing_hybrid_moe_registers_the_name(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_experts_implementation_of_transformers(qwen: Path) -> None:
    import hybrid_moe  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(
        qwen, experts_implementation="hybrid_moe"
    )
    assert torch.equal(logits(model, prompt()), logits(load(qwen), prompt()))


@pytest.mark.parametrize("excess", [1, None], ids=["one more", "none"])
def test_a_token_takes_no_more_experts_than_there_are(excess: int | None, tmp_path: Path) -> None:
    config = build("qwen3_moe").config
    folder, experts = save(build("qwen3_moe"), tmp_path), config.num_experts
    taken = 0 if excess is None else experts + excess
    message = f"lets a token take {taken} experts of {experts}: .* between 1 and {experts}"
    edit_config(folder, num_experts_per_tok=taken)
    with pytest.raises(CheckpointError, match=rf"config\.json of .*{tmp_path.name} {message}"):
        from_pretrained(folder, threads=1, progress=False)
    # a configuration that is given counts in its place
    assert from_pretrained(folder, threads=1, progress=False, config=config)
    config.num_experts_per_tok = taken
    with pytest.raises(CheckpointError, match=f"^the configuration {message}"):
        from_pretrained(folder, threads=1, progress=False, config=config)
