"""Every expert of every family has the values that its checkpoint means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix
from hybrid_moe.loaders import Checkpoint, inspect_checkpoint
from hybrid_moe.loaders.expert_source import check_sizes
from hybrid_moe.loaders.naming import SCHEMES, find_layers
from hybrid_moe.loaders.safetensors import ReadBuffer
from tests.families import (
    BITS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Experts,
    FamilyFixture,
    decode_mxfp4,
    write_family,
)

Family = Callable[[str], FamilyFixture]


def values(matrix: Matrix) -> np.ndarray:
    """What a matrix means, in float64, by `ml_dtypes` alone."""
    if matrix.scales is None:
        return matrix.codes.view(ml_dtypes.bfloat16).astype(np.float64)
    return decode_mxfp4(np.ascontiguousarray(matrix.codes), np.ascontiguousarray(matrix.scales))


def assert_is_expert(tensors: ExpertTensors, layer: Experts, expert: int) -> None:
    for name in ("gate", "up", "down"):
        matrix: Matrix = getattr(tensors, name)
        assert np.array_equal(values(matrix), getattr(layer, name)[expert]), name
        bias = getattr(layer, f"{name}_bias")
        if bias is None:
            assert matrix.bias is None
        else:
            assert matrix.bias is not None and matrix.bias.dtype == np.float32
            assert np.array_equal(matrix.bias, bias[expert])
        assert matrix.codes.strides[-1] == matrix.codes.itemsize  # what packers rely on


@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert(family: Family, name: str) -> None:
    fixture = family(name)
    checkpoint = Checkpoint.open(fixture.directory)
    assert checkpoint.layers == tuple(fixture.layers)
    buffer = ReadBuffer()
    for number, layer in fixture.layers.items():
        source = checkpoint.layer(number)
        check_sizes(source, EXPERTS, HIDDEN, INTERMEDIATE)
        assert source.formats.name == fixture.methods[number]
        assert source.has_bias == (layer.gate_bias is not None)
        for expert in range(EXPERTS):
            assert_is_expert(source.expert(expert), layer, expert)
            assert_is_expert(source.expert(expert, buffer=buffer), layer, expert)
        with pytest.raises(IndexError, match="there are 4 experts"):
            source.expert(EXPERTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_layer_holds_all_its_keys(family: Family, name: str) -> None:
    checkpoint = Checkpoint.open(family(name).directory)
    source = checkpoint.layer(1)
    tensors = {t for stacks in source.stacks for stack in stacks for t in stack.tensors}
    assert {tensor.key for tensor in tensors} == set(checkpoint.keys_of(1).keys)
    size = sum(tensor.nbytes for tensor in tensors)
    assert source.expert_nbytes * EXPERTS == size
    bias_growth = size_of_biases(source) if source.has_bias else 0  # BF16 stored, float32 loaded
    assert source.nbytes_as(source.formats) == size + bias_growth


def size_of_biases(source: object) -> int:
    return EXPERTS * (2 * INTERMEDIATE + HIDDEN) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_wider_floats_are_rounded_to_bf16(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fixture = write_family(name, tmp_path, dtype=dtype)
    source = Checkpoint.open(tmp_path).layer(0)
    layer = fixture.layers[0]
    for expert in range(EXPERTS):
        tensors = source.expert(expert)
        for projection in ("gate", "up", "down"):
            exact = getattr(layer, projection)[expert].astype(np.float32)
            rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
            assert np.array_equal(values(getattr(tensors, projection)), rounded)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("mxfp4")])
def test_bf16_experts_are_quantized_on_demand(family: Family, name: str) -> None:
    fixture = family(name)
    layer = fixture.layers[1]
    tensors = Checkpoint.open(fixture.directory).layer(1).expert(2, MXFP4, ReadBuffer())
    for projection in ("gate", "up", "down"):
        matrix: Matrix = getattr(tensors, projection)
        codes, scales = MXFP4.encode(getattr(layer, projection)[2].astype(np.float32))
        assert np.array_equal(matrix.codes, codes)
        assert np.array_equal(matrix.scales, scales)


def test_long_matrices_are_quantized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_moe.loaders import quantize

    monkeypatch.setattr(quantize, "_CHUNK", 3 * 64)
    w = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    pieces, whole = quantize.encode(MXFP4, w), MXFP4.encode(w)
    assert all(np.array_equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_fused_tensors_of_older_releases_are_transposed(tmp_path: Path) -> None:
    """Qwen3-VL-MoE on the hub: [E, H, 2I] and [E, I, H], gate first, no biases."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((3, 64, 64)).astype(ml_dtypes.bfloat16)
    down = rng.standard_normal((3, 32, 64)).astype(ml_dtypes.bfloat16)
    stem = "model.language_model.layers.5.mlp.experts."
    save_file(
        {f"{stem}gate_up_proj": gate_up, f"{stem}down_proj": down}, tmp_path / "m.safetensors"
    )
    source = Checkpoint.open(tmp_path).layer(5)
    assert (source.num_experts, source.hidden, source.intermediate) == (3, 64, 32)
    layer = Experts(
        gate_up[:, :, :32].transpose(0, 2, 1).astype(np.float64),
        gate_up[:, :, 32:].transpose(0, 2, 1).astype(np.float64),
        down.transpose(0, 2, 1).astype(np.float64),
    )
    for expert in range(3):
        assert_is_expert(source.expert(expert), layer, expert)


PREFIXES = ["", "model.", "language_model.model.", "model.language_model.", "thinker.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_schemes_are_told_apart(scheme: object, prefix: str) -> None:
    from hybrid_moe.loaders.naming import NamingScheme

    assert isinstance(scheme, NamingScheme)
    endings = (scheme.weights[0], scheme.scales[0])
    keys = [
        f"{scheme.stem(prefix, layer, expert)}{projection}{ending}"
        for layer in (10, 3)
        for expert in range(2)
        for projection in (scheme.gate, scheme.up, scheme.down)
        for ending in endings
    ]
    found = find_layers(
        dict.fromkeys([*keys, f"{prefix}layers.3.mlp.gate.weight", "mtp." + keys[0]])
    )
    assert list(found) == [3, 10]
    for number, layer in found.items():
        assert (layer.scheme, layer.prefix, layer.layer) == (scheme, prefix, number)
        assert layer.experts == (set() if scheme.fused else {0, 1})
        assert set(layer.keys) == {key for key in keys if f"layers.{number}." in key}


@pytest.mark.parametrize(
    "other",
    [
        "layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ],
)
def test_two_names_for_one_layer(other: str) -> None:
    with pytest.raises(CheckpointError, match="layer 0 has experts under two names"):
        find_layers(["model.layers.0.mlp.experts.0.gate_proj.weight", other])


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect(family: Family, name: str) -> None:
    fixture = family(name)
    summary = inspect_checkpoint(fixture.directory)
    layers = tuple(fixture.layers)
    assert summary.problems == ()
    assert summary.model_type == fixture.config.model_type
    assert summary.architectures and summary.scheme
    assert (summary.moe_layers, summary.num_layers) == (layers, 2)
    assert (summary.num_experts, summary.experts_per_token) == (EXPERTS, TOP_K)
    assert (summary.hidden, summary.intermediate) == (HIDDEN, INTERMEDIATE)
    assert {n: m for m, numbers in summary.formats.items() for n in numbers} == fixture.methods
    assert summary.draft_layers == ((2,) if name.endswith("draft") else ())
    assert ("draft layers" in summary.parts) == name.endswith("draft")
    assert sum(summary.parts.values()) == sum(summary.dtypes.values()) == summary.total_bytes
    assert {"attention", "embeddings", "router", "norms"} <= set(summary.parts)
    assert ("shared experts" in summary.parts) == name.startswith("deepseek")
    assert ("dense MLP" in summary.parts) == name.startswith("deepseek_v3")
    weights = EXPERTS * 3 * HIDDEN * INTERMEDIATE  # of a layer
    biased = any(layer.gate_bias is not None for layer in fixture.layers.values())
    biases = 4 * len(layers) * EXPERTS * (2 * INTERMEDIATE + HIDDEN) * biased
    stored = sum(weights * BITS[method] / 8 for method in fixture.methods.values())
    expected = {
        m: len(layers) * weights * b / 8 + biases
        for m, b in BITS.items()
        if set(fixture.methods.values()) <= {"BF16", m}
    }
    ram = {m: summary.ram_experts[m] for m in (*BITS, "STORED") if m in summary.ram_experts}
    assert "GPTQ_INT4" not in summary.ram_experts  # groups of 128, and rows of 96
    if fixture.method == "STORED":
        expected["STORED"] = stored + biases
    assert ram == expected
    not_run = summary.parts["routed experts"] + summary.parts.get("draft layers", 0)
    assert summary.ram_rest == summary.total_bytes - not_run
    assert summary.parts["routed experts"] == stored + biases / 2


def test_inspect_says_what_cannot_be_loaded(family: Family, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(family("qwen3_moe").directory / "model.safetensors")
    for key in [key for key in tensors if ".1.mlp.experts." in key]:
        tensors[key] = tensors[key].to(torch.float8_e5m2)
    save_file(tensors, tmp_path / "model.safetensors")
    summary = inspect_checkpoint(tmp_path)
    assert dict(summary.formats) == {"BF16": (0,)}
    (problem,) = summary.problems
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in problem
    assert "F8_E5M2 without scales, which is no known format" in problem
