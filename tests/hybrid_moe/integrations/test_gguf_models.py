"""GGUF models end to end: what they compute is what their checkpoints of safetensors do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers import gguf_model
from hybrid_moe.integrations.transformers.gguf_model import read_config, read_tokenizer
from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.loaders import convert_checkpoint
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.planning.model import read_model
from tests.hybrid_moe.integrations.gguf_cases import TINY, entries, metadata, tiny_file
from tests.hybrid_moe.integrations.loading_cases import hybrid_experts
from tests.loaders.gguf.files import (
    Entry,
    GgufFile,
    entry,
    expert_entries,
    model_file,
    write_split,
)

TEXT = "Emma was surprised to see Mr. Knightley in the garden, and\n  said nothing."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as one file."""
    return tiny_file().write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def load(path: Path, **options: Any) -> Any:
    """On one thread, without bars."""
    return from_pretrained(path, "auto", threads=1, progress=False, **options)


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("dense", [pytest.param("torch", marks=pytest.mark.full), "bf16"])
def test_logits_are_those_of_the_checkpoint(tiny: Path, dense: str) -> None:
    """Bit for bit: the same weights, in other files and under other names."""
    torch.testing.assert_close(
        logits(load(tiny, dense=dense)), logits(load(TINY, dense=dense)), rtol=0, atol=0
    )


def test_a_split_model_of_two_files(tmp_path: Path) -> None:
    """The output layer, if there is one, and everything else may lie in any file."""
    file = tiny_file()
    paths = write_split(tmp_path, file, [len(file.tensors) - 14, 14])
    torch.testing.assert_close(
        logits(load(paths[1], dense="torch")), logits(load(TINY, dense="torch")), rtol=0, atol=0
    )


def test_gpt_oss(tmp_path: Path) -> None:
    """Biases, sinks, and YaRN, which Transformers' own reader of GGUF gets no configuration of."""
    torch.manual_seed(3)
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=128, sliding_window=8,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "safetensors"
    model.save_pretrained(folder)
    path = tmp_path / "gpt-oss.gguf"
    tensors = tuple(entries(folder, gguf.MODEL_ARCH.GPT_OSS))
    GgufFile(tuple(metadata(folder, "gpt-oss")), tensors).write(path)
    read, given = read_config(GgufIndex.open_gguf(path)), config
    for name in ("head_dim", "sliding_window", "layer_types", "num_local_experts"):
        assert getattr(read, name) == getattr(given, name)
    assert read.rope_parameters == pytest.approx(given.rope_parameters)
    ours = load(path, dense="torch")
    theirs = from_pretrained(folder, "MXFP4", threads=1, dense="torch", progress=False)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


def test_experts_are_never_dequantized(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library or Transformers makes of a tensor: none is an expert's, and no array of
    the experts' size is asked for."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    values = gguf_model._values

    def watched(index: GgufIndex, tensor: Any) -> Any:
        seen.append((tensor.stored_name, tensor.shape))
        return values(index, tensor)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("Transformers' reader would dequantize whole files")

    shapes: list[tuple[int, ...]] = []
    dequantize = gguf.quants.dequantize

    def counted(data: Any, kind: Any) -> Any:
        shapes.append(data.shape)
        return dequantize(data, kind)

    monkeypatch.setattr(gguf_model, "_values", watched)
    monkeypatch.setattr("gguf.quants.dequantize", counted)
    monkeypatch.setattr("gguf.GGUFReader.__init__", never)
    monkeypatch.setattr(transformers.modeling_gguf_pytorch_utils, "load_gguf_checkpoint", never)
    load(tiny)
    names = [tensor.name for tensor in tiny_file().tensors]
    dense = [name for name in names if "_exps." not in name]
    assert sorted(name for name, _ in seen) == sorted(dense)
    assert len(shapes) == len(dense)
    assert all(len(shape) < 3 for shape in shapes)


def test_the_default_keeps_what_a_file_stores(tmp_path: Path) -> None:
    """Of a checkpoint of safetensors it is MXFP4, which these layers do not become."""

    def in_q8_0(tensor: Entry) -> Entry:
        if "down_exps" not in tensor.name:
            return tensor
        blocks = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:2], -1)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return Entry(tensor.name, tensor.shape, 8, data.tobytes())

    file = tiny_file()
    path = replace(file, tensors=tuple(map(in_q8_0, file.tensors))).write(tmp_path / "m.gguf")
    model = from_pretrained(path, threads=1, progress=False)
    names = {experts.formats.name for experts in hybrid_experts(model)}
    assert names == {"MXFP4 (gate, up) and INT8 (down)"}
    with pytest.raises(ValueError, match=r"LLAMAFILE"):
        from_pretrained(path, "MXFP4", threads=1, progress=False)


def test_the_tokenizer_is_the_files(tiny: Path) -> None:
    """The same tokens as of the tokenizer that the file was made from."""
    tokenizer = read_tokenizer(tiny)
    reference = transformers.AutoTokenizer.from_pretrained(TINY)
    assert tokenizer(TEXT)["input_ids"] == reference(TEXT)["input_ids"]
    assert tokenizer.eos_token_id == reference.eos_token_id


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", TEXT, "--max-new-tokens", "3", "--threads", "1", "--model"],
        ["inspect"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_a_file(tiny: Path, command: list[str]) -> None:
    """As they take a folder."""
    result = CliRunner().invoke(app, [*command, str(tiny)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_plan_finds_what_it_finds_in_the_checkpoint(tiny: Path) -> None:
    """The same experts, linear layers and configuration; numbers that GGUF has in float32 are
    larger."""
    ours, theirs = read_model(tiny, method="auto"), read_model(TINY, method="auto")
    assert ours.layers == theirs.layers
    assert ours.dense.arenas == theirs.dense.arenas
    assert ours.parts.keys() == theirs.parts.keys()
    for name in ("attention", "embeddings"):
        assert ours.parts[name] == theirs.parts[name]
    for name in ("num_key_value_heads", "head_dim", "layer_types", "vocab_size"):
        assert ours.config[name] == theirs.config[name]


def test_convert_does_not_take_one(tiny: Path, tmp_path: Path) -> None:
    """And says why."""
    with pytest.raises(ValueError, match=r"is a GGUF model"):
        convert_checkpoint(tiny.parent, tmp_path / "out", "INT8")


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    """The message says so, which it knows, and what can be done."""
    path = model_file(*expert_entries(0), architecture="deepseek2").write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"'deepseek2'.*qwen3moe.*LLAMAFILE") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [e for e in t if e.name != "blk.1.attn_q.weight"], "lacks .*1.self_attn.q_proj"),
        (
            lambda t: [*t, entry("blk.1.attn_extra.weight", (32,))],
            "attn_extra.weight in .*no place",
        ),
        (
            lambda t: [
                entry(e.name, (32, 64)) if e.name == "blk.0.attn_k.weight" else e for e in t
            ],
            "another shape than the model for .*0.self_attn.k_proj",
        ),
        (
            lambda t: [
                Entry(e.name, (128, 256), 35, bytes(128 * 66))
                if e.name == "blk.0.attn_k.weight"
                else e
                for e in t
            ],
            None,
        ),
    ],
    ids=["missing", "homeless", "shape", "TQ2_0"],
)
def test_dense_tensors_that_do_not_fit(change: Any, message: str | None, tmp_path: Path) -> None:
    """By name, as for safetensors; types of which experts are not read do for other tensors."""
    file = tiny_file()
    path = replace(file, tensors=tuple(change(file.tensors))).write(tmp_path / "m.gguf")
    if message is None:
        weight = load(path, dense="torch").model.layers[0].self_attn.k_proj.weight
        assert weight.shape == (128, 256)
        return
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_configuration_in_the_folder_counts(tmp_path: Path) -> None:
    """As does a tokenizer: `config.json` beside the file is the model's."""
    file = tiny_file()
    assert file.keys[0][0] == "general.architecture"
    replace(file, keys=file.keys[:1]).write(tmp_path / "m.gguf")  # no other metadata
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    assert np.array_equal(read_tokenizer(tmp_path)(TEXT)["input_ids"][:3], [1659, 305, 2262])
    torch.testing.assert_close(
        logits(load(tmp_path, dense="torch")), logits(load(TINY, dense="torch")), rtol=0, atol=0
    )
