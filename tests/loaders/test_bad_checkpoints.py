"""One corruption each: the error names the tensor and its file, and nothing else happens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.loaders.expert_source import check_sizes
from tests.families import EXPERTS, FamilyFixture, Tensors

Family = Callable[[str], FamilyFixture]


@dataclass(frozen=True)
class Case:
    """A family, what is done to its tensors, and what is said about it.

    Attributes:
        family: name of the fixture.
        key: the tensor that is damaged and that the message must name.
        damage: the new tensor; None removes it.
        message: pattern in the message.
    """

    family: str
    key: str
    damage: Callable[[torch.Tensor], torch.Tensor] | None
    message: str


def nan_scale(scales: torch.Tensor) -> torch.Tensor:
    damaged = scales.clone()
    damaged.view(torch.uint8).flatten()[-1] = 255
    return damaged


def nan_weight(weight: torch.Tensor) -> torch.Tensor:
    damaged = weight.clone()
    damaged.flatten()[-1] = float("nan")
    return damaged


QWEN = "model.layers.1.mlp.experts."
DSV4 = "layers.1.ffn.experts."

CASES: dict[str, Case] = {
    "weight missing": Case("qwen3_moe", f"{QWEN}3.up_proj.weight", None, "is missing from"),
    "first weight missing": Case("qwen3_moe", f"{QWEN}0.gate_proj.weight", None, "is missing"),
    "down missing": Case(
        "mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", None, "is missing from"
    ),
    "scale missing": Case("deepseek_v4_mxfp4", f"{DSV4}2.w3.scale", None, "is missing beside"),
    "first scale missing": Case(
        "qwen3_moe_mxfp4", f"{QWEN}0.gate_proj.weight_scale", None,
        r"is missing beside .*0\.gate_proj\.weight .*U8 weights need scales",
    ),
    "blocks missing": Case("gpt_oss_mxfp4", f"{QWEN}gate_up_proj_blocks", None, "is missing from"),
    "down blocks missing": Case("gpt_oss_mxfp4", f"{QWEN}down_proj_blocks", None, "missing"),
    "fused scales missing": Case("gpt_oss_mxfp4", f"{QWEN}down_proj_scales", None, "is missing"),
    "bias missing": Case("gpt_oss_mxfp4", f"{QWEN}down_proj_bias", None, "is missing beside"),
    "rows missing": Case(
        "qwen3_moe", f"{QWEN}3.up_proj.weight", lambda w: w[:-1].clone(),
        r"shape \(95, 64\), expected \(96, 64\)",
    ),
    "columns missing": Case(
        "deepseek_v4_mxfp4", f"{DSV4}3.w2.weight", lambda w: w[:, :16].clone(),
        r"shape \(64, 16\), expected \(64, 48\) for 64 rows of 96 MXFP4 weights",
    ),
    "axis missing": Case("qwen3_moe", f"{QWEN}2.down_proj.weight", torch.flatten, "2 axes"),
    "fused shapes disagree": Case(
        "qwen3_moe_fused", f"{QWEN}gate_up_proj", lambda w: w[:, :-32].clone(), "does not go with"
    ),
    "fused experts disagree": Case(
        "qwen3_moe_fused", f"{QWEN}down_proj", lambda w: w[:3].clone(),
        r"shape \(3, 64, 96\), expected \(4, 64, 96\)",
    ),
    "fused without experts": Case(
        "qwen3_moe_fused", f"{QWEN}gate_up_proj", lambda w: w[:0].clone(), "has no experts"
    ),
    "groups missing": Case(
        "deepseek_v4_mxfp4", f"{DSV4}1.w2.scale", lambda s: s[:, :-1].clone(),
        r"scales of shape \(64, 2\), expected \(64, 3\) \(one per 32 inputs\)",
    ),
    "group of 16": Case(
        "gpt_oss_mxfp4", f"{QWEN}gate_up_proj_scales", lambda s: s.repeat_interleave(2, -1),
        r"scales of shape \(4, 192, 4\), expected \(4, 192, 2\)",
    ),
    "other dtype": Case(
        "qwen3_moe", f"{QWEN}1.gate_proj.weight", lambda w: w.float(), "dtype F32, but .* is BF16"
    ),
    "unknown dtype": Case(
        "qwen3_moe", f"{QWEN}0.gate_proj.weight", lambda w: w.to(torch.int32),
        "I32 without scales, which is no known format",
    ),
    "other scale dtype": Case(
        "deepseek_v4_mxfp4", f"{DSV4}1.w1.scale", lambda s: s.view(torch.uint8),
        "dtype U8, but .* is F8_E8M0",
    ),
    "float scales": Case(
        "deepseek_v4_mxfp4", f"{DSV4}0.w1.scale", lambda s: s.float(), "I8 with F32 scales"
    ),
    "bias of wrong shape": Case(
        "gpt_oss", f"{QWEN}gate_up_proj_bias", lambda b: b[:, :-1].clone(),
        r"shape \(4, 191\), expected \(4, 192\)",
    ),
    "bias of wrong dtype": Case(
        "gpt_oss", f"{QWEN}gate_up_proj_bias", lambda b: b.to(torch.int32), "bias of dtype I32"
    ),
    "NaN scale": Case("deepseek_v4_mxfp4", f"{DSV4}2.w3.scale", nan_scale, "scale is 255"),
    "NaN scale of bytes": Case(
        "qwen3_moe_mxfp4", f"{QWEN}3.down_proj.weight_scale", nan_scale, "scale is 255"
    ),
    "NaN scale, fused": Case(
        "gpt_oss_mxfp4", f"{QWEN}gate_up_proj_scales", nan_scale, "expert 3 of .*scale is 255"
    ),
    "NaN weight": Case("qwen3_moe", f"{QWEN}3.down_proj.weight", nan_weight, "NaN or infinite"),
}  # fmt: skip


def write_damaged(
    fixture: FamilyFixture, directory: Path, change: Callable[[Tensors], None]
) -> Path:
    shutil.copytree(fixture.directory, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def read_everything(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    for number in checkpoint.layers:
        source = checkpoint.layer(number)
        for expert in range(source.num_experts):
            source.expert(expert, MXFP4)


@pytest.mark.parametrize("name", CASES)
def test_damaged_tensor(family: Family, name: str, tmp_path: Path) -> None:
    case = CASES[name]

    def change(tensors: Tensors) -> None:
        tensor = tensors.pop(case.key)
        if case.damage is not None:
            tensors[case.key] = case.damage(tensor)

    directory = write_damaged(family(case.family), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=case.message) as caught:
        read_everything(directory)
    assert case.key in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (3, r"has 3 experts, config\.json says num_local_experts=4.*experts\.2\.gate_proj"),
        (1, r"expert 1 of layer 1 has no tensors.*experts\.1\.gate_proj.*but expert 3 has"),
    ],
)
def test_too_few_experts(family: Family, gone: int, message: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for projection in ("gate", "up", "down"):
            del tensors[f"{QWEN}{gone}.{projection}_proj.weight"]

    directory = write_damaged(family("qwen3_moe"), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory).layer(1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss_mxfp4", "deepseek_v4_mxfp4"])
def test_too_many_experts(family: Family, name: str, tmp_path: Path) -> None:
    directory = shutil.copytree(family(name).directory, tmp_path / "damaged")
    file = directory / "config.json"
    file.write_text(re.sub(r'("(?:num|n)_\w*experts": )4', r"\g<1>3", file.read_text()))
    with pytest.raises(CheckpointError, match=r"has 4 experts, config\.json says .*=3"):
        Checkpoint.open(directory).layer(0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((EXPERTS + 1, None, None), "num_experts=4, not 5"),
        ((None, 128, None), "hidden_size=64, not 128"),
        ((None, None, 64), "moe_intermediate_size=96, not 64"),
    ],
)
def test_sizes_that_the_caller_expects(family: Family, sizes: tuple[int], message: str) -> None:
    source = Checkpoint.open(family("qwen3_moe").directory).layer(0)
    with pytest.raises(CheckpointError, match=message):
        check_sizes(source, *sizes)


def test_rows_that_are_no_multiple_of_a_group(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts.0."
    save_file(
        {
            f"{stem}gate_proj.weight": torch.zeros(32, 48, dtype=torch.bfloat16),
            f"{stem}up_proj.weight": torch.zeros(32, 48, dtype=torch.bfloat16),
            f"{stem}down_proj.weight": torch.zeros(48, 32, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"gate_proj.*rows of 48 weights.*multiple of 32"):
        Checkpoint.open(tmp_path).layer(0)


def test_experts_with_foreign_names_are_reported(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.experts.0.gate_proj.B"
    save_file({key: torch.zeros(4, 32, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"gate_proj\.weight: .*missing.*only {key}"):
        Checkpoint.open(tmp_path).layer(0)


def test_a_key_cannot_demand_memory(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.experts.999999.gate_proj.weight"
    save_file({key: torch.zeros(32, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expert 0 of layer 0 has no tensors"):
        Checkpoint.open(tmp_path).layer(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("deepseek_v3", "layer 0 of .* no routed experts .*; layers 1 have some"),
     ("qwen3_moe", "layer 7 of .*; layers 0-1 have some")],
)  # fmt: skip
def test_a_layer_without_experts(family: Family, name: str, message: str) -> None:
    checkpoint = Checkpoint.open(family(name).directory)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.layer(0 if name == "deepseek_v3" else 7)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_damaged_config(family: Family, text: str, tmp_path: Path) -> None:
    directory = shutil.copytree(family("qwen3_moe").directory, tmp_path / "damaged")
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        Checkpoint.open(directory)


def test_a_single_file_needs_no_config(family: Family) -> None:
    checkpoint = Checkpoint.open(family("qwen3_moe").directory / "model.safetensors")
    assert checkpoint.config == {}
    assert checkpoint.layer(0).num_experts == EXPERTS


def test_nested_configurations(family: Family, tmp_path: Path) -> None:
    directory = shutil.copytree(family("qwen3_moe").directory, tmp_path / "nested")
    (directory / "config.json").write_text(json.dumps({"text_config": {"num_experts": 9}}))
    with pytest.raises(CheckpointError, match="num_experts=9"):
        Checkpoint.open(directory).layer(0)
