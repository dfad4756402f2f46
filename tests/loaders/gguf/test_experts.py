"""Experts out of GGUF files: their weights are those that the `gguf` library reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array, bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders import Checkpoint, ExpertSource
from hybrid_moe.loaders.gguf.ggml_types import READ, TYPES_BY_NAME
from hybrid_moe.loaders.safetensors import ReadBuffer
from tests.loaders.gguf.files import (
    BOOL,
    E_,
    H_,
    I_,
    UINT16,
    UINT32,
    Entry,
    GgufFile,
    entry,
    expert_entries,
    model_file,
    scalar,
    write_split,
)


def library_weights(*files: Path) -> dict[str, Array]:
    """Every tensor's values by the library's reader and dequantizers, float32."""
    found = {}
    for file in files:
        for tensor in gguf.GGUFReader(file).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name] = values
    return found


def check_layer(source: ExpertSource, weights: dict[str, Array], buffer: ReadBuffer | None) -> None:
    """Raise where an expert differs from the library's values."""
    stem = f"blk.{source.layer}.ffn_"
    for expert in range(source.num_experts):
        tensors = source.expert(expert, buffer=buffer)
        for name, fmt in (
            ("gate", source.formats.gate_up),
            ("up", source.formats.gate_up),
            ("down", source.formats.down),
        ):
            for ending in ("weight", "bias"):
                if f"{stem}gate_up_exps.{ending}" in weights and name != "down":
                    both = weights[f"{stem}gate_up_exps.{ending}"][expert]
                    expected = np.split(both, 2)[0 if name == "gate" else 1]
                else:
                    all_experts = weights.get(f"{stem}{name}_exps.{ending}")
                    expected = None if all_experts is None else all_experts[expert]
                matrix = getattr(tensors, name)
                if ending == "bias":
                    assert (matrix.bias is None) == (expected is None)
                    if expected is not None:
                        np.testing.assert_array_equal(matrix.bias, expected)
                    continue
                assert expected is not None
                if fmt is BF16:  # F16 and F32 are rounded
                    expected = bf16_to_f32(f32_to_bf16(expected))
                np.testing.assert_array_equal(matrix.dequantize(fmt), expected)


@pytest.mark.parametrize("down", READ)
def test_experts_of_every_type(down: str, tmp_path: Path) -> None:
    """Gate and up in one type and down in another, with the caller's memory and without."""
    gate = READ[(READ.index(down) + 3) % len(READ)]
    file = model_file(*expert_entries(0, gate, down)).write(tmp_path / "model.gguf")
    source = Checkpoint.open(file).layer(0)
    assert (source.num_experts, source.hidden, source.intermediate) == (E_, H_, I_)
    assert source.formats.down is TYPES_BY_NAME[down].format
    assert source.formats.gate_up is TYPES_BY_NAME[gate].format
    weights = library_weights(file)
    check_layer(source, weights, None)
    check_layer(source, weights, ReadBuffer())
    stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    assert source.expert_nbytes * source.num_experts == stored


@pytest.mark.parametrize("fused", [False, True])
def test_biases_and_fused_tensors(fused: bool, tmp_path: Path) -> None:
    """gpt-oss has biases; newer converters put gate and up into one tensor."""
    experts = expert_entries(0, "MXFP4", "MXFP4", fused=fused, bias=True)
    file = model_file(*experts).write(tmp_path / "model.gguf")
    source = Checkpoint.open(file).layer(0)
    assert source.has_bias
    source.check_layout()
    check_layer(source, library_weights(file), ReadBuffer())
    assert source.with_layout("halves") is source
    if fused:
        with pytest.raises(ValueError, match="halves"):
            source.with_layout("interleaved")


def test_layers_differ(tmp_path: Path) -> None:
    """As Q4_K_M has them: the down projection of some layers in more bits."""
    experts = [*expert_entries(0), *expert_entries(1, "Q4_K", "Q4_K"), *expert_entries(3, "Q8_0")]
    file = model_file(*experts, layers=3).write(tmp_path / "model.gguf")
    checkpoint = Checkpoint.open(file, require_complete=False)
    assert checkpoint.layers == (0, 1, 3)
    names = [source.formats.name for source in checkpoint.sources().values()]
    assert names == [
        "Q4_K (gate, up) and Q6_K (down)", "Q4_K", "INT8 (gate, up) and Q6_K (down)"
    ]  # fmt: skip
    weights = library_weights(file)
    for source in checkpoint.sources().values():
        check_layer(source, weights, None)


def test_16_bit_experts_are_quantized_where_asked(tmp_path: Path) -> None:
    """BF16 becomes MXFP4 by the encoder; blocks become nothing else."""
    experts = [*expert_entries(0, "F32", "BF16"), *expert_entries(1)]
    file = model_file(*experts, layers=2).write(tmp_path / "model.gguf")
    floats, blocks = Checkpoint.open(file).sources().values()
    wanted = LayerFormats(MXFP4, MXFP4)
    assert not floats.is_exact(floats.formats)
    assert blocks.is_exact(blocks.formats)
    tensors = floats.expert(1, wanted)
    codes, scales = MXFP4.encode(library_weights(file)["blk.0.ffn_up_exps.weight"][1])
    np.testing.assert_array_equal(tensors.up.codes, codes)
    np.testing.assert_array_equal(tensors.up.scales, scales)
    with pytest.raises(ValueError, match=r"Q4_K .* does not become MXFP4"):
        blocks.expert(1, wanted)
    with pytest.raises(IndexError, match="expert 3"):
        blocks.expert(3)


def test_a_split_model(tmp_path: Path) -> None:
    """Any of its files, or the folder, is the model; the first file may have metadata alone."""
    file = model_file(*expert_entries(0), *expert_entries(1), layers=2)
    paths = write_split(tmp_path, file, [0, 2, 4])
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"what projects images")
    weights = library_weights(*paths[1:])
    for path in (*paths, tmp_path):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.model.num_layers == 2
        for source in checkpoint.sources().values():
            check_layer(source, weights, None)
        assert checkpoint.is_current
    paths[2].write_bytes(paths[2].read_bytes() + b"\0")
    assert not checkpoint.is_current
    with pytest.raises(CheckpointError, match="changed since"):
        checkpoint.layer(1).expert(0)


def test_a_changed_folder_is_noticed(tmp_path: Path) -> None:
    """A second model in the folder of an open one."""
    model_file(*expert_entries(0)).write(tmp_path / "a.gguf")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.is_current
    model_file(*expert_entries(0)).write(tmp_path / "b.gguf")
    assert not checkpoint.is_current


def test_a_file_without_an_ending(tmp_path: Path) -> None:
    """Ollama's blobs are named by their hash."""
    path = model_file(*expert_entries(0)).write(tmp_path / "sha256-0123")
    assert Checkpoint.open(path).layers == (0,)


def test_safetensors_come_first(tmp_path: Path) -> None:
    """They are what Transformers reads in a folder of both."""
    from safetensors.numpy import save_file

    model_file(*expert_entries(0)).write(tmp_path / "a.gguf")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert set(Checkpoint.open(tmp_path).index.tensors) == {"x"}


BAD_SPLITS: dict[str, tuple[dict[str, bytes], int, str]] = {
    "count": ({"split.count": scalar(UINT16, 3)}, 1, "split.count is 3, but by its name .* 2"),
    "number": ({"split.no": scalar(UINT16, 0)}, 1, "split.no is 0, but by its name it must be 1"),
    "missing": ({}, 1, "split.no is None"),
    "a bool": ({"split.no": scalar(BOOL, 1), "split.count": scalar(UINT16, 2)}, 1, "no is True"),
    "tensors": (
        {
            "split.no": scalar(UINT16, 0),
            "split.count": scalar(UINT16, 2),
            "split.tensors.count": scalar(UINT32, 7),
        },
        0,
        "split.tensors.count is 7, but the files have 3 tensors",
    ),
}


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_files_that_do_not_belong_together(name: str, tmp_path: Path) -> None:
    """By a message that names the file and the key."""
    split, number, message = BAD_SPLITS[name]
    file = model_file(*expert_entries(0))
    paths = write_split(tmp_path, file, [1, 2])
    good = dict(write_split_keys(number))
    if name != "missing":
        good |= split
    else:
        del good["split.no"]
    keys = (*(file.keys if number == 0 else ()), *good.items())
    tensors = file.tensors[:1] if number == 0 else file.tensors[1:]
    replace(file, keys=keys, tensors=tensors).write(paths[number])
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(paths[0])
    assert str(paths[number]) in str(caught.value)


def write_split_keys(number: int) -> dict[str, bytes]:
    """The keys of one of two files."""
    return {"split.no": scalar(UINT16, number), "split.count": scalar(UINT16, 2)}


def test_missing_and_renamed_files(tmp_path: Path) -> None:
    """What names say must be there, and what metadata says must be in the names."""
    paths = write_split(tmp_path, model_file(*expert_entries(0)), [1, 2])
    paths[1].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: this file is missing"):
        Checkpoint.open(paths[0])
    with pytest.raises(CheckpointError, match="one of 2 files of a model"):
        Checkpoint.open(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="this file is missing"):
        Checkpoint.open(tmp_path)
    third = paths[0].rename(tmp_path / "m-00003-of-00002.gguf")
    with pytest.raises(CheckpointError, match="number 3 of 2"):
        Checkpoint.open(third)


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    """Q4 and Q8 of one model lie in one folder: which is meant is not guessed."""
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf"):
        model_file(*expert_entries(0)).write(tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"several models.*model-Q4_K_M.gguf, model-Q8_0.gguf"
    ):
        Checkpoint.open(tmp_path)


def without(entries: list[Entry], name: str) -> list[Entry]:
    """Those of other names."""
    return [e for e in entries if e.name != f"blk.0.ffn_{name}"]


def with_type(name: str, number: int) -> list[Entry]:
    """Experts of which a tensor has a type of ggml that is not read."""
    kind = next(t for t in TYPES_BY_NAME.values() if t.number == number)
    found = expert_entries(0)
    blocks = E_ * I_ * H_ // kind.weights
    bad = Entry(f"blk.0.ffn_{name}_exps.weight", (E_, I_, H_), number, bytes(blocks * kind.nbytes))
    return [bad if e.name == bad.name else e for e in found]


BAD_EXPERTS: dict[str, tuple[list[Entry], str]] = {
    "no up": (without(expert_entries(0), "up_exps.weight"), r"blk.0.ffn_up_exps.weight: .*missing"),
    "no down": (without(expert_entries(0), "down_exps.weight"), "ffn_down_exps.weight: .*missing"),
    "IQ2_XXS": (with_type("up", 16), r"ffn_up_exps.weight in .*: .* ggml type IQ2_XXS .*Q4_K"),
    "NVFP4": (with_type("gate", 40), "ffn_gate_exps.weight in .*ggml type NVFP4"),
    "I32": (with_type("gate", 26), "ffn_gate_exps.weight in .*ggml type I32"),
    "gate and up": (
        expert_entries(0, "Q4_K", up="Q5_K"), "ffn_gate_exps.weight .*is Q4_K and .*Q5_K"
    ),
    "up of other rows": (
        [*without(expert_entries(0), "up_exps.weight"),
         entry("blk.0.ffn_up_exps.weight", (E_, 256, H_), "Q4_K")],
        r"ffn_up_exps.weight in .*shape \(3, 256, 256\), expected \(3, 512, 256\)",
    ),
    "experts differ": (
        [*without(expert_entries(0), "up_exps.weight"),
         entry("blk.0.ffn_up_exps.weight", (2, I_, H_), "Q4_K")],
        r"ffn_up_exps.weight in .*shape \(2, 512, 256\)",
    ),
    "two axes": (
        [*without(expert_entries(0), "down_exps.weight"),
         entry("blk.0.ffn_down_exps.weight", (H_, I_), "Q4_K")],
        r"ffn_down_exps.weight in .*shape \(256, 512\), expected \[experts",
    ),
    "rows of 48": (
        expert_entries(0, "F32", "F32", sizes=(2, 64, 48)), "F32 rows of 48 weights; .* of 32"
    ),
    "one bias": (
        without(expert_entries(0, bias=True), "up_exps.bias"), "_exps.bias in .*there is none besid"
    ),
    "bias of other length": (
        [*without(expert_entries(0, bias=True), "up_exps.bias"),
         entry("blk.0.ffn_up_exps.bias", (E_, 7), "F32")],
        r"ffn_up_exps.bias in .*shape \(3, 7\)",
    ),
    "bias in blocks": (
        [*without(expert_entries(0, bias=True), "up_exps.bias"),
         entry("blk.0.ffn_up_exps.bias", (E_, I_), "Q8_0")],
        "ffn_up_exps.bias in .*type Q8_0",
    ),
    "a scale": (
        [*expert_entries(0), entry("blk.0.ffn_up_exps.scale", (E_,), "F32")],
        "ffn_up_exps.scale in .*not known",
    ),
    "both namings": (
        [*expert_entries(0), entry("blk.0.ffn_gate_up_exps.weight", (E_, 2 * I_, H_), "Q4_K")],
        "_exps.weight in .*beside blk.0.ffn_gate_up_exps.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_bad_experts_are_refused(name: str, tmp_path: Path) -> None:
    """When the layer is described, before a byte of data is read."""
    entries, message = BAD_EXPERTS[name]
    path = model_file(*entries).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path).layer(0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", READ)
def test_bad_experts_of_every_type(kind: str, tmp_path: Path) -> None:
    """A tensor that is missing, has other sizes or another type, or ends early."""
    whole = expert_entries(0, kind, kind)
    content = model_file(*whole).content()
    other = "Q5_1" if kind != "Q5_1" else "Q5_0"
    for place, good in enumerate(whole):
        experts, rows, inputs = good.shape
        changed = [
            entry(good.name, (experts, rows // 2, inputs), kind),
            entry(good.name, (experts - 1, rows, inputs), kind),
            entry(good.name, (rows, inputs), kind),
            entry(good.name, (experts, rows, 2 * inputs), kind),
        ]
        if "down" not in good.name:  # which may differ in type
            changed.append(entry(good.name, good.shape, other))
        for replacement in ([], *([e] for e in changed)):
            entries = [*whole[:place], *replacement, *whole[place + 1 :]]
            path = model_file(*entries).write(tmp_path / "model.gguf")
            with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_\w+_exps\.weight") as caught:
                Checkpoint.open(path).layer(0)
            assert str(path) in str(caught.value)
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[:-33])  # 32 may be padding
    with pytest.raises(CheckpointError, match=r"ffn_down_exps\.weight"):
        Checkpoint.open(path)


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    """Mixtral's first files; llama.cpp reads them no longer either."""
    old = entry("blk.0.ffn_gate.3.weight", (I_, H_), "Q4_K")
    path = model_file(old).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_gate.3.weight in .*March 2024"):
        Checkpoint.open(path)


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    """A name of another package's in a GGUF file."""
    file = GgufFile(tensors=(entry("output.weight", (8,)), entry("lm_head.weight", (8,))))
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .*: there is output.weight in "):
        Checkpoint.open(file.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize(("kind", "at"), [("Q4_K", 0), ("Q6_K", 208), ("Q8_0", 0), ("Q4_1", 2)])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_numbers_that_are_none(kind: str, at: int, bits: int, tmp_path: Path) -> None:
    """An infinite or NaN scale, minimum or factor in a block is found when it is read."""
    entries = expert_entries(0, kind, kind)
    row = TYPES_BY_NAME[kind]
    data = bytearray(entries[1].data)
    block = 5 * row.nbytes
    data[block + at : block + at + 2] = bits.to_bytes(2, "little")
    entries[1] = replace(entries[1], data=bytes(data))
    path = model_file(*entries).write(tmp_path / "model.gguf")
    source = Checkpoint.open(path).layer(0)
    with pytest.raises(CheckpointError, match=r"expert 0 of blk.0.ffn_up_exps.weight in .*finite"):
        source.expert(0)
    source.expert(1)


def test_an_infinite_bias(tmp_path: Path) -> None:
    """Biases are numbers too."""
    entries = expert_entries(0, bias=True)
    bias = np.frombuffer(entries[1].data, np.float32).copy()
    bias[I_ + 3] = np.inf
    entries[1] = replace(entries[1], data=bias.tobytes())
    source = Checkpoint.open(model_file(*entries).write(tmp_path / "model.gguf")).layer(0)
    source.expert(0)
    with pytest.raises(CheckpointError, match=r"expert 1 of blk.0.ffn_gate_exps.bias"):
        source.expert(1)


def test_what_the_metadata_says(tmp_path: Path) -> None:
    """By the names of config.json; a config.json in the folder counts instead."""
    file = model_file(*expert_entries(0), layers=1).write(tmp_path / "model.gguf")
    model = Checkpoint.open(file).model
    stated: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "num_experts": E_,
        "num_experts_per_tok": 2,
        "hidden_size": H_,
        "moe_intermediate_size": I_,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }
    assert {name: model.stated[name] for name in stated} == stated
    (tmp_path / "config.json").write_text('{"num_experts": 5}')
    with pytest.raises(CheckpointError, match=r"has 3 experts, .*num_experts=5"):
        Checkpoint.open(tmp_path).layer(0)


def test_a_model_that_lacks_layers(tmp_path: Path) -> None:
    """Its metadata says how many there are."""
    path = model_file(*expert_entries(0), layers=2).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="layer 1 of"):
        Checkpoint.open(path)
    other = entry("blk.1.ffn_up.weight", (I_, H_), "Q4_K")
    model_file(*expert_entries(0), other, layers=2).write(path)
    assert Checkpoint.open(path).layers == (0,)
