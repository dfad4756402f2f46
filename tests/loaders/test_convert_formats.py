"""What `convert_checkpoint` writes of every format: read by our loader, by Transformers and by
compressed-tensors, with the same values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybrid_moe.formats.numbers import f32_to_bf16
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders import Checkpoint, convert_checkpoint
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.written import written_format, written_methods
from tests.families import EXPERTS, HIDDEN, INTERMEDIATE, FamilyFixture

Family = Callable[[str], FamilyFixture]
PROJECTIONS = ("gate", "up", "down")
_STEM = "model.layers.1.mlp.experts.3.up_proj"
N, K = INTERMEDIATE, HIDDEN

WRITTEN: dict[str, dict[str, tuple[str, list[int]]]] = {
    "FP8": {"weight": ("F8_E4M3", [N, K]), "weight_scale_inv": ("F32", [-(-N // 128), 1])},
    "FP8_PERCHANNEL": {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", [N, 1])},
    "MXFP8": {"weight": ("F8_E4M3", [N, K]), "weight_scale_inv": ("U8", [N, K // 32])},
    "AMXINT8": {"weight": ("I8", [N, K]), "weight_scale": ("F32", [N, 1])},
    "AMXINT4": {"weight_packed": ("I32", [N, K // 8]), "weight_scale": ("F32", [N, 1]),
                "weight_shape": ("I64", [2])},
    "RAWINT4": {"weight_packed": ("I32", [N, K // 8]), "weight_scale": ("BF16", [N, K // 32]),
                "weight_shape": ("I64", [2])},
}  # fmt: skip
"""Tensors of one matrix, by method, in the names of Qwen3-MoE; MXFP4 and INT8: test_convert.py."""


def dequantized(source: LayerSource, expert: int) -> dict[str, np.ndarray]:
    """float32 matrices of an expert."""
    tensors, formats = source.expert(expert), source.formats
    kinds = (formats.gate_up, formats.gate_up, formats.down)
    return {
        name: getattr(tensors, name).dequantize(fmt)
        for name, fmt in zip(PROJECTIONS, kinds, strict=True)
    }


def assert_held(fixture: FamilyFixture, target: Path, fmt: WeightFormat) -> None:
    """The experts at `target` are those of `fixture` as the format's quantizer makes them."""
    checkpoint = Checkpoint.open(target)
    for number, layer in fixture.layers.items():
        source = checkpoint.layer(number)
        assert source.formats.each == (fmt,)
        for expert in range(EXPERTS):
            read = dequantized(source, expert)
            for name in PROJECTIONS:
                w = getattr(layer, name)[expert].astype(np.float32)
                assert np.array_equal(read[name], fmt.dequantize(*fmt.encode(w))), (number, name)
                bias = getattr(layer, f"{name}_bias")
                kept = getattr(source.expert(expert), name).bias
                assert (kept is None) == (bias is None)
                assert bias is None or np.array_equal(kept, bias[expert])


@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v4", "gpt_oss"])
def test_our_loader_reads_it(family: Family, name: str, method: str, tmp_path: Path) -> None:
    fixture, target = family(name), tmp_path / "converted"
    convert_checkpoint(fixture.directory, target, method, progress=False, threads=2)
    assert_held(fixture, target, written_format(method))
    config = json.loads((target / "config.json").read_text())
    fmt = written_format(method)
    assert config["hybrid_moe"] == {"experts": fmt.name, "group": fmt.group}
    if name == "qwen3_moe":
        index = Checkpoint.open(target).index
        found = {key for key in index.tensors if key.startswith(_STEM)}
        assert found == {f"{_STEM}.{suffix}" for suffix in WRITTEN[method]}
        for suffix, (dtype, shape) in WRITTEN[method].items():
            info = index.info(f"{_STEM}.{suffix}")
            assert (info.dtype, list(info.shape)) == (dtype, shape)


def test_fp8_becomes_integers_of_rows(family: Family, tmp_path: Path) -> None:
    """From its own values; nothing of FP8 stays."""
    fp8, target = tmp_path / "fp8", tmp_path / "rows"
    convert_checkpoint(family("qwen3_moe").directory, fp8, "FP8", progress=False)
    convert_checkpoint(fp8, target, "AMXINT8", progress=False)
    before, after = (Checkpoint.open(folder).layer(1) for folder in (fp8, target))
    fmt = written_format("AMXINT8")
    for name, w in dequantized(before, 2).items():
        expected = fmt.dequantize(*fmt.encode(w))
        assert np.array_equal(dequantized(after, 2)[name], expected)
    assert not [key for key in after.index.tensors if key.endswith("weight_scale_inv")]
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"


def test_every_method_that_makes_weights_is_written() -> None:
    assert {*WRITTEN, "MXFP4", "INT8"} | {"MOE_INT4", "MOE_INT8"} == set(written_methods())


def rounded(values: np.ndarray) -> np.ndarray:
    """To bf16, as bits."""
    return f32_to_bf16(values)


def transformers_experts(target: Path, layer: int) -> Mapping[str, np.ndarray]:
    """bf16 bits of a layer's fused experts, as Transformers holds them after loading."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    block = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    return {
        name: value.detach().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        for name, value in block.named_parameters()
    }


TRANSFORMERS = [
    ("qwen3_moe", "FP8"), ("qwen3_moe", "MXFP8"), ("gpt_oss", "MXFP4"), ("deepseek_v4", "MXFP4"),
    ("deepseek_v4", "FP8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), TRANSFORMERS)
def test_transformers_reads_it(family: Family, name: str, method: str, tmp_path: Path) -> None:
    """Without a GPU it dequantizes while it loads, and rounds to bf16."""
    pytest.importorskip("accelerate", reason="Transformers loads quantized weights through it")
    fixture, target = family(name), tmp_path / "converted"
    convert_checkpoint(fixture.directory, target, method, progress=False)
    number = max(fixture.layers)
    held = transformers_experts(target, number)
    source = Checkpoint.open(target).layer(number)
    for expert in range(EXPERTS):
        ours = {n: rounded(w) for n, w in dequantized(source, expert).items()}
        gate_up = held["gate_up_proj"][expert]
        down = held["down_proj"][expert]
        if name == "gpt_oss":  # [E, K, N], rows of gate and up in turn
            gate, up, down = gate_up.T[0::2], gate_up.T[1::2], down.T
        else:
            gate, up = np.split(gate_up, 2)
        for theirs, mine in ((gate, "gate"), (up, "up"), (down, "down")):
            assert np.array_equal(theirs, ours[mine]), (expert, mine)


H, I = 256, 128
"""Sizes of `longer`, whose rows are whole groups of every size."""


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of two experts in BF16 beside a norm and a head."""
    folder = tmp_path_factory.mktemp("longer")
    torch.manual_seed(0)
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(shape).bfloat16()
        for e in range(2)
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] = torch.randn(8, H).bfloat16()
    tensors["model.norm.weight"] = torch.ones(H).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return folder


_DOWN = "model.layers.0.mlp.experts.1.down_proj"
INTEGERS = [("RAWINT4", None), ("RAWINT4", 64), ("RAWINT4", 128), ("AMXINT4", None)]


def converted(
    source: Path, target: Path, method: str, group: int | None
) -> dict[str, torch.Tensor]:
    """Tensors of one matrix of `source` after conversion, by suffix."""
    convert_checkpoint(source, target, method, progress=False, group_size=group)
    tensors = load_file(target / "model.safetensors")
    return {key.rsplit(".", 1)[1]: t for key, t in tensors.items() if key.startswith(_DOWN)}


def unpacked_words(words: np.ndarray) -> np.ndarray:
    """compressed-tensors' `unpack_from_int32` for 4 bits, as documented: input i of eight in bits
    4i to 4i + 3, plus 8."""
    shifted = words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))
    return ((shifted & 15).astype(np.int64) - 8).reshape(len(words), -1)


@pytest.mark.parametrize(("method", "group"), INTEGERS)
def test_int4_is_packed_as_documented(
    longer: Path, method: str, group: int | None, tmp_path: Path
) -> None:
    down = converted(longer, tmp_path / "converted", method, group)
    assert down["weight_shape"].tolist() == [H, I]
    scales = down["weight_scale"].float().numpy()
    assert scales.shape == (H, 1 if method == "AMXINT4" else I // (group or 32))
    values = unpacked_words(down["weight_packed"].numpy()) * np.repeat(
        scales, I // scales.shape[1], 1
    )
    source = Checkpoint.open(tmp_path / "converted").layer(0)
    assert np.array_equal(values.astype(np.float32), dequantized(source, 1)["down"])
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    said = config["quantization_config"]
    assert said["ignore"] == ["lm_head"]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == (
        None if method == "AMXINT4" else group or 32
    )


@pytest.mark.parametrize(
    ("method", "group"), [*INTEGERS, ("AMXINT8", None), ("FP8_PERCHANNEL", None)]
)
def test_compressed_tensors_reads_it(
    longer: Path, method: str, group: int | None, tmp_path: Path
) -> None:
    """Its own configuration class and decompressor, on the tensors of one matrix."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    down = converted(longer, tmp_path / "converted", method, group)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    theirs = decompressed(config["quantization_config"], down)
    expected = dequantized(Checkpoint.open(tmp_path / "converted").layer(0), 1)["down"]
    assert np.array_equal(rounded(theirs), rounded(expected))


def decompressed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> np.ndarray:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    result = compressor.decompress(dict(tensors), scheme)
    return result["weight"].float().numpy()


def test_what_is_refused(family: Family, tmp_path: Path) -> None:
    source, out = family("qwen3_moe").directory, tmp_path / "out"
    for method, group, message in (
        ("NVFP4", None, "not to NVFP4"),
        ("AWQ", None, "AWQ stands for"),
        ("GPTQ_INT4", None, "the methods .*RAWINT4.*, not to INT4_G128_FP16"),
        ("RAWINT4", 64, "rows of 96 weights; of INT4_G64_BF16 .* a multiple of 64"),
        ("RAWINT4", 48, "groups of 32 or 64 or 128, not of 48"),
        ("AMXINT4", 32, "groups of whole rows, not of 32"),
        ("FP8", 32, "groups of 128, not of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, out, method, progress=False, group_size=group)
        assert not out.exists()
