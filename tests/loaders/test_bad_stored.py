"""Every tensor of every way to store weights, damaged in turn: the error names it and its file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid_moe.formats.table import METHODS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, held_formats
from tests.stored_kinds import FILE, KINDS, Kind, Tensors, edit, gptq, packed_int4, write

Damage = Callable[[torch.Tensor], torch.Tensor | None]

UNREAD = (".weight_shape", ".input_scale")
"""Tensors that may be absent, or anything."""


def read_everything(folder: Path) -> None:
    source = Checkpoint.open(folder).layer(0)
    for expert in range(source.num_experts):
        source.expert(expert)


def _shorter(tensor: torch.Tensor) -> torch.Tensor:
    """One row less; of a scalar, two of it."""
    return tensor[:-1].clone() if tensor.dim() else torch.stack([tensor, tensor])


def _not_finite(tensor: torch.Tensor) -> torch.Tensor | None:
    """With a scale that is no number, if the type has one."""
    damaged = tensor.clone()
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
        damaged.view(torch.uint8).flatten()[-1] = 255
    elif tensor.dtype is torch.float8_e4m3fn:
        damaged.view(torch.uint8).flatten()[-1] = 0x7F
    elif tensor.dtype.is_floating_point:
        damaged.view(-1)[-1] = float("inf")
    else:
        return None
    return damaged


DAMAGES: dict[str, Damage] = {
    "missing": lambda _: None,
    "of another type": lambda tensor: tensor.to(torch.int64),
    "shorter": _shorter,
    "with an axis more": lambda tensor: tensor.reshape(1, 1, *tensor.shape),
}


def _damaged(kind: Kind, tensors: Tensors) -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """What is done, to which key, and what it becomes: of the first expert and of the last."""
    for expert, projection in ((0, 0), (1, 1), (1, 2)):
        stem = kind.key(expert, projection, "")
        for key in [key for key in tensors if key.startswith(stem) and not key.endswith(UNREAD)]:
            for name, damage in DAMAGES.items():
                yield name, key, damage(tensors[key])
            if "scale" in key:
                damaged = _not_finite(tensors[key])
                if damaged is not None:
                    yield "not finite", key, damaged


@pytest.mark.parametrize("name", KINDS)
def test_each_tensor(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    good = write(tmp_path / "good", kind).folder
    found = 0
    for what, key, tensor in _damaged(kind, load_file(good / FILE)):
        folder = shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True)

        def change(tensors: Tensors, key: str = key, tensor: Any = tensor) -> None:
            del tensors[key]
            if tensor is not None:
                tensors[key] = tensor

        edit(folder, change)
        with pytest.raises(CheckpointError) as caught:
            read_everything(folder)
        # what differs from the first expert is blamed, so of that one perhaps the second
        message, stem = str(caught.value), key.rpartition(".")[0]
        named = kind.block if ".0." in stem.partition(kind.block)[2] else stem
        assert named in message, (what, key, message)
        assert str(folder) in message, (what, key, message)
        found += 1
    assert found >= 3 * len(DAMAGES)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_and_whole_again(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, KINDS[name]).folder
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_everything(folder)
    (folder / FILE).write_bytes(whole)
    read_everything(folder)


def _with(kind: str, config: dict[str, Any]) -> Kind:
    old = KINDS[kind]
    return Kind(old.format, old.make, old.method, {"quantization_config": config})


_G = {"quant_method": "gptq", "bits": 4, "sym": True}
REFUSED: dict[str, tuple[Kind, str]] = {
    "act-order": (_with("gptq", {**_G, "desc_act": True}), r"desc_act \(act-order\) is not read"),
    "8 bits": (_with("gptq", {**_G, "bits": 8}), "gptq with 8 bits is not read"),
    "marlin": (
        _with("gptq", {**_G, "checkpoint_format": "marlin"}),
        "gptq packed as 'marlin' is not read, only as gptq or gptq_v2",
    ),
    "gemv": (
        _with("awq", {"quant_method": "awq", "bits": 4, "version": "gemv"}),
        "awq packed as 'gemv' is not read, only as gemm",
    ),
    "awq said of gptq": (
        _with("gptq", {"quant_method": "awq", "bits": 4}), "gptq's, but config.json says awq",
    ),
    "actorder": (
        _with("int4 32", {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "actorder": "group"}}},
        }),
        r"compressed-tensors with desc_act",
    ),
    "not symmetric": (
        Kind("", gptq(128, symmetric=False), "", {"quantization_config": _G}),
        "says that it is symmetric, but some of its zero points are not 7",
    ),
    "second format": (
        _with("gptq", {**_G, "checkpoint_format": "gptq_v2"}), "zero points are not 8",
    ),
    "inexact scales": (
        Kind("", packed_int4(32, torch.float32), ""), "which bf16 does not hold exactly",
    ),
    "inexact scales of zeros": (
        Kind("", packed_int4(32, torch.float32, zeros=True), ""), "which fp16 does not hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, message = REFUSED[name]
    write(tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_everything(tmp_path)
    assert "gate_proj" in str(caught.value)


def test_scattered_groups(tmp_path: Path) -> None:
    kind = KINDS["gptq zeros"]
    write(tmp_path, kind)
    key = kind.key(1, 2, ".g_idx")
    edit(tmp_path, lambda t: t.update({key: t[key].flip(0)}))
    with pytest.raises(CheckpointError, match=r"down_proj.*scatters the groups .*act-order"):
        read_everything(tmp_path)


def test_gate_and_up_are_alike(tmp_path: Path) -> None:
    kind = KINDS["fp8"]
    write(tmp_path, kind)

    def change(tensors: Tensors) -> None:
        for expert in range(2):
            weight, scale = (kind.key(expert, 1, s) for s in (".weight", ".weight_scale_inv"))
            tensors[weight] = tensors[weight].float().bfloat16()
            del tensors[scale]

    edit(tmp_path, change)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight in .*BF16, but .*gate_proj.* F8_E4M3"
    ):
        read_everything(tmp_path)


def test_a_projection_may_differ(tmp_path: Path) -> None:
    """Gate and up in FP8, down in BF16: each is held as it is stored."""
    kind, other = KINDS["fp8"], KINDS["int4 32"]
    write(tmp_path, kind)
    made, _ = other.make(np.random.default_rng(1), *kind.shape(2))

    def change(tensors: Tensors) -> None:
        for expert in range(2):
            for suffix in (".weight", ".weight_scale_inv"):
                del tensors[kind.key(expert, 2, suffix)]
            for suffix, tensor in made.items():
                tensors[kind.key(expert, 2, suffix)] = tensor.clone()

    edit(tmp_path, change)
    source = Checkpoint.open(tmp_path).layer(0)
    assert source.formats.name == "FP8 (gate, up) and INT4_G32_BF16 (down)"
    read_everything(tmp_path)
    with pytest.raises(ValueError, match='does not become RAWINT4: use "auto"') as caught:
        held_formats(source, METHODS["RAWINT4"])
    assert "FP8 (gate, up)" in str(caught.value)
