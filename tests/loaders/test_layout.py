"""Where gate and up lie in fused tensors is proven, said, or refused; a name never decides."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, convert_checkpoint, inspect_checkpoint
from hybrid_moe.loaders.layout import KNOWN, layout_of_model, layout_of_module
from hybrid_moe.loaders.model_config import ModelConfig
from tests.families import EXPERTS, FAMILIES, FamilyFixture, write_family
from tests.loaders.test_families import Family, assert_is_expert

FILE = "model.safetensors"
BIASED = {"gpt_oss": "interleaved", "privacy_filter": "halves"}
"""Families of equal names, with the layout that their modules have."""


def forget_model(fixture: FamilyFixture, directory: Path, **config: Any) -> Path:
    """The same weights with no `config.json`, or one that says something else."""
    directory.mkdir()
    save_file(load_file(fixture.directory / FILE), directory / FILE)
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


class Gated(torch.nn.Module):
    """An experts module by its `_apply_gate` alone."""

    def __init__(self, gate: slice, up: slice, up_on_gate: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.swap = gate, up, up_on_gate

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x[..., self.gate], x[..., self.up]
        if self.swap:
            gate, up = up, gate
        return torch.nn.functional.silu(gate) * up


FIRST, SECOND = slice(0, 4), slice(4, 8)
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (Gated(FIRST, SECOND), "halves"),
        (Gated(EVEN, ODD), "interleaved"),
        (Gated(FIRST, SECOND, up_on_gate=True), None),
        (Gated(EVEN, ODD, up_on_gate=True), None),
        (Gated(FIRST, ODD), None),
    ],
)
def test_a_module_is_asked_by_what_it_computes(module: Gated, layout: str | None) -> None:
    assert layout_of_module(module) == layout


MODELS = sorted(
    {family.config().model_type for family in FAMILIES.values()}
    | {"qwen3_vl_moe", "qwen3_5_moe", "qwen3_next", "glm4_moe", "jamba", "aria"}
)


@pytest.mark.parametrize("family", MODELS)
def test_models_that_transformers_knows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks that Transformers puts on its modules agree with what the modules compute."""
    monkeypatch.setattr("hybrid_moe.loaders.layout.KNOWN", {})
    text = transformers.CONFIG_MAPPING[family]().get_text_config(decoder=True)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(text)
    marks = {m.is_concatenated for m in model.modules() if hasattr(m, "is_concatenated")}
    layout = layout_of_model(ModelConfig({"model_type": family}))
    assert {layout} == {"halves" if mark else "interleaved" for mark in marks}
    assert KNOWN.get(family, layout) == layout


@pytest.mark.parametrize(
    "raw", [{}, {"model_type": "unheard_of"}, {"model_type": "llama"}, {"model_type": []}]
)
def test_models_that_nobody_knows(raw: dict[str, Any]) -> None:
    assert layout_of_model(ModelConfig(raw)) is None


def test_a_model_that_cannot_be_built(caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig({"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 0})
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        assert layout_of_model(config) is None
    (record,) = caplog.records
    assert "mixtral" in record.getMessage()


@pytest.mark.parametrize("name", BIASED)
def test_biased_experts_of_an_unknown_model(family: Family, name: str, tmp_path: Path) -> None:
    fixture = family(name)
    directory = forget_model(fixture, tmp_path / "in")
    source = Checkpoint.open(directory).layer(0)
    with pytest.raises(CheckpointError, match=r"gate_up_proj in .*gate_up_layout=\"halves\" or"):
        source.expert(0)
    (first, _) = inspect_checkpoint(directory).problems
    assert "gate and up may be two halves" in first
    with pytest.raises(CheckpointError, match="gate and up may be two halves"):
        convert_checkpoint(directory, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    told = source.with_layout(BIASED[name])  # type: ignore[arg-type]
    for expert in range(EXPERTS):
        assert_is_expert(told.expert(expert), fixture.layers[0], expert)
    convert_checkpoint(directory, tmp_path / "out", progress=False, gate_up_layout=BIASED[name])
    converted = Checkpoint.open(tmp_path / "out").layer(0).expert(1)
    expected = told.expert(1, MXFP4)
    for part in ("gate", "up", "down"):
        ours, theirs = getattr(converted, part), getattr(expected, part)
        assert np.array_equal(ours.codes, theirs.codes) and np.array_equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("name", BIASED)
def test_a_layout_that_the_model_does_not_have(family: Family, name: str, tmp_path: Path) -> None:
    fixture = family(name)
    source = Checkpoint.open(fixture.directory).layer(0)
    (wrong,) = set(BIASED.values()) - {BIASED[name]}
    with pytest.raises(ValueError, match=f'"{wrong}", but .* have "{BIASED[name]}"'):
        source.with_layout(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate_up_layout is 'thirds', must be halves or"):
        convert_checkpoint(
            fixture.directory, tmp_path / "out", progress=False, gate_up_layout="thirds"
        )
    assert source.with_layout(None) is source


def test_gpt_oss_needs_no_transformers(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    fixture = family("gpt_oss")
    assert_is_expert(Checkpoint.open(fixture.directory).layer(1).expert(3), fixture.layers[1], 3)


def test_gpt_oss_without_biases_is_still_interleaved(family: Family, tmp_path: Path) -> None:
    fixture = family("gpt_oss")
    directory = forget_model(fixture, tmp_path / "in", model_type="gpt_oss")
    tensors = load_file(directory / FILE)
    save_file({k: t for k, t in tensors.items() if not k.endswith("_bias")}, directory / FILE)
    source = Checkpoint.open(directory).layer(0)
    assert source.interleaved and not source.has_bias


@pytest.mark.parametrize("name", ["gpt_oss_mxfp4", "qwen3_moe_fused", "deepseek_v4_fused_mxfp4"])
def test_names_that_leave_no_layout_open(family: Family, name: str, tmp_path: Path) -> None:
    """Only gpt-oss's MXFP4 release has `*_blocks`; without biases, every family has halves."""
    fixture = family(name)
    source = Checkpoint.open(forget_model(fixture, tmp_path / "in")).layer(0)
    assert_is_expert(source.expert(2), fixture.layers[0], 2)


def test_per_expert_names_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = write_family("qwen3_moe", tmp_path)
    monkeypatch.setattr("hybrid_moe.loaders.checkpoint.layout_of_model", pytest.fail)
    source = Checkpoint.open(tmp_path).layer(0)
    source.check_layout()
    assert_is_expert(source.expert(1), fixture.layers[0], 1)
