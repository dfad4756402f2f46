"""`save_pretrained` from strips: the same tensors as Transformers', and the way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hybrid_moe.integrations.transformers.registration import offload
from hybrid_moe.loaders import Checkpoint
from tests.families import FAMILIES, make_model, write_family
from tests.hybrid_moe.checkpoints import save, to_mxfp4
from tests.hybrid_moe.integrations.dense.wide_models import WIDE, build_wide
from tests.hybrid_moe.integrations.loading_cases import load, plain
from tests.hybrid_moe.tiny_models import build, logits, prompt

ALIKE = {"qwen3_moe_packed_mxfp4", "minimax_m2_mxfp4", "deepseek_v3_draft"}
"""Families that differ from others in what is read only."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert not tensors.keys() & found.keys()
        found |= tensors
    return found


def assert_same(one: Path, other: Path) -> None:
    """The same keys, dtypes, shapes and bytes."""
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[key].dtype, right[key].shape), key
        pair = (t.contiguous().view(torch.uint8) for t in (tensor, right[key]))
        assert torch.equal(*pair), key


@pytest.mark.parametrize(
    ("family", "original"),
    [*((family, True) for family in WIDE), ("gpt_oss", False), ("deepseek_v4", False)],
)
def test_writes_what_transformers_writes(family: str, original: bool, tmp_path: Path) -> None:
    model = build_wide(family)
    model.save_pretrained(tmp_path / "plain", save_original_format=original)
    model.generation_config.max_new_tokens = 7
    offload(model, "BF16", threads=1, progress=False)
    model.save_pretrained(tmp_path / "ours", save_original_format=original)
    assert_same(tmp_path / "plain", tmp_path / "ours")
    written = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "ours")
    ]
    assert written[0] == written[1]
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 7
    if original:
        one, other = (load(tmp_path / name) for name in ("plain", "ours"))
        assert torch.equal(logits(one, prompt()), logits(other, prompt()))
        eager = plain(tmp_path / "ours")
        assert all(not p.is_meta and p.dtype == torch.bfloat16 for p in eager.lm_head.parameters())


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ALIKE])
def test_a_loaded_checkpoint_is_written_back(name: str, tmp_path: Path) -> None:
    """Every family: experts keep their bits and their names. Held against what Transformers makes
    of the same checkpoint where it can load it, else against the checkpoint itself."""
    fixture = write_family(name, tmp_path / "first")
    folder = fixture.directory
    if name == "privacy_filter":  # no causal language model
        model = make_model(fixture.config, 0, torch.bfloat16, FAMILIES[name].auto)
        offload(model, "BF16", threads=1, progress=False)
    else:
        model = load(folder, None)
    model.save_pretrained(tmp_path / "second")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "second")
    assert before.layers == after.layers
    for number in after.layers:
        one, other = before.layer(number), after.layer(number)
        assert one.formats == other.formats
        for expert in range(fixture.num_experts):
            pair = [source.with_layout(None).expert(expert) for source in (one, other)]
            for role in ("gate", "up", "down"):
                left, right = (getattr(tensors, role) for tensors in pair)
                assert (left.codes == right.codes).all()
                assert left.scales is None or (left.scales == right.scales).all()
                assert left.bias is None or (left.bias == right.bias).all()
    if "mxfp4" in name or "mixed" in name:
        return
    if name == "privacy_filter":
        assert_same(folder, tmp_path / "second")
        return
    plain(folder).save_pretrained(tmp_path / "plain")
    assert_same(tmp_path / "plain", tmp_path / "second")


def test_gpt_oss_mxfp4_loads_in_plain_transformers(tmp_path: Path) -> None:
    """As openai publishes it, from BF16 experts that were quantised here."""
    model = offload(build("gpt_oss"), "MXFP4", threads=1, progress=False)
    model.save_pretrained(tmp_path / "ours")
    published = to_mxfp4(save(build("gpt_oss"), tmp_path / "published"), "gpt_oss")
    assert_same(published, tmp_path / "ours")
    one, other = (logits(plain(folder), prompt()) for folder in (published, tmp_path / "ours"))
    assert torch.equal(one, other)
    assert torch.equal(logits(load(tmp_path / "ours", None), prompt()), logits(model, prompt()))
    assert not hasattr(model.config, "quantization_config")


def test_shards_and_what_was_there_before(tmp_path: Path) -> None:
    model = build_wide("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = tensors_of(tmp_path)
    many = len(list(tmp_path.glob("*.safetensors")))
    offload(model, "BF16", threads=1, progress=False)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    few = len(list(tmp_path.glob("*.safetensors")))
    assert 1 < few < many
    assert {k: t.shape for k, t in tensors_of(tmp_path).items()} == {
        k: t.shape for k, t in expected.items()
    }
    assert torch.equal(logits(load(tmp_path), prompt()), logits(model, prompt()))
    model.save_pretrained(tmp_path, max_shard_size=10**9)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(load(tmp_path), prompt()), logits(model, prompt()))


def test_pieces_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_moe.integrations.transformers.dense.saving.PART_BYTES", 1000)
    model = build_wide("deepseek_v4")
    model.save_pretrained(tmp_path / "plain")
    offload(model, "BF16", threads=1, progress=False).save_pretrained(tmp_path / "ours")
    assert_same(tmp_path / "plain", tmp_path / "ours")


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = offload(build_wide("qwen3_moe"), "BF16", threads=1, progress=False)
    twin = copy.deepcopy(model)
    twin.config.bos_token_id = 3
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"variant": "fp8"}, "variant='fp8'"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True"),
        ({"max_shard_size": "5 elephants"}, "max_shard_size is '5 elephants'"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = offload(build_wide("qwen3_moe"), "BF16", threads=1, progress=False)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        model.save_pretrained(tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dense", ["int8", "mxfp4"])
def test_quantised_dense_layers_are_refused_by_name(dense: str, tmp_path: Path) -> None:
    model = offload(build_wide("qwen3_moe"), "BF16", threads=1, dense=dense, progress=False)
    with pytest.raises(NotImplementedError, match=rf"dense layers in {dense.upper()} are not"):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload(build_wide("qwen3_moe"), "BF16", threads=1, progress=False)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(
        "hybrid_moe.cpu_kernels.layer.ExpertLayer.unpack", lambda *_: pytest.fail("of the test")
    )
    with pytest.raises(pytest.fail.Exception):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_state_dict_is_transformers_business(tmp_path: Path) -> None:
    model = offload(build_wide("qwen3_moe"), "BF16", threads=1, progress=False)
    model.save_pretrained(tmp_path, state_dict={"extra": torch.ones(2)})
    assert load_file(tmp_path / "model.safetensors").keys() == {"extra"}
    assert isinstance(model, transformers.Qwen3MoeForCausalLM)
