"""Experts that kt-kernel has quantized. The files are packed here as its `_pack_block` does it:
rows of a tile side by side, then each square of 16 x 16 words transposed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, held_formats, inspect_checkpoint
from hybrid_moe.loaders.safetensors import ReadBuffer

Ints = npt.NDArray[np.int64]
FILE = "model.safetensors"
N_BLOCK = {4: 128, 8: 64}
K_BLOCK = 3584


def _tile(codes: Ints, bits: int) -> npt.NDArray[np.uint8]:
    """32 rows of 64 bytes; of four bits, inputs 0..63 in the low halves and 64..127 in the high."""
    raw = codes.astype(np.int8).view(np.uint8)
    if bits == 4:
        raw = (raw[:, :64] & 15) | (raw[:, 64:] << 4)
    words = np.ascontiguousarray(raw).view(np.uint32)
    squares = [np.ascontiguousarray(words[start : start + 16].T) for start in (0, 16)]
    return np.concatenate(squares).view(np.uint8).reshape(-1)


def pack(codes: Ints, bits: int) -> torch.Tensor:
    """A matrix of signed codes as it lies in kt-kernel's `BufferB`."""
    n, k = codes.shape
    step = 64 * 8 // bits
    out = np.zeros(n * k * bits // 8, np.uint8)
    for n_block in range(0, n, N_BLOCK[bits]):
        n_size = min(N_BLOCK[bits], n - n_block)
        for n_begin in range(0, n_size, 32):
            for k_block in range(0, k, K_BLOCK):
                k_size = min(K_BLOCK, k - k_block)
                for k_begin in range(0, k_size, step):
                    at = n_block * k + k_block * n_size + n_begin * k_size + k_begin * 32
                    row, column = n_block + n_begin, k_block + k_begin
                    tile = _tile(codes[row : row + 32, column : column + step], bits)
                    out[at * bits // 8 :][: len(tile)] = tile
    return torch.from_numpy(out.view(np.int8))


def write(
    folder: Path, bits: int, nodes: int, hidden: int, intermediate: int, experts: int = 2
) -> dict[str, npt.NDArray[np.float64]]:
    """A checkpoint of one layer, and its weights [E, N, K]."""
    rng = np.random.default_rng(bits + nodes)
    tensors, values = {}, {}
    most = 7 if bits == 4 else 127
    part = intermediate // nodes
    for name in ("gate", "up", "down"):
        N, K = (hidden, part) if name == "down" else (part, hidden)
        matrices = []
        for expert in range(experts):
            parts = []
            for node in range(nodes):
                codes = rng.integers(-most - 1, most + 1, (N, K))
                scales = rng.uniform(1e-4, 1e-3, N).astype(np.float32)
                stem = f"blk.0.ffn_{name}_exps.{expert}.numa.{node}"
                tensors[f"{stem}.weight"] = pack(codes, bits)
                tensors[f"{stem}.scale"] = torch.from_numpy(scales)
                factor = scales.astype(np.float64)[:, None] * (16 if bits == 4 else 1)
                parts.append(codes * factor)
            matrices.append(np.concatenate(parts, axis=1 if name == "down" else 0))
        values[name] = np.stack(matrices)
    save_file(tensors, folder / FILE)
    return values


@pytest.mark.parametrize(
    ("bits", "nodes", "hidden", "intermediate"),
    [
        (4, 1, 128, 256), (4, 2, 256, 256), (4, 3, 384, 384), (4, 1, 3712, 128),
        (8, 1, 64, 192), (8, 2, 128, 256), (8, 1, 3648, 64),
    ],
)  # fmt: skip
def test_values(bits: int, nodes: int, hidden: int, intermediate: int, tmp_path: Path) -> None:
    values = write(tmp_path, bits, nodes, hidden, intermediate)
    source = Checkpoint.open(tmp_path).layer(0)
    row, part = FORMATS[f"INT{bits}_ROW_FLOAT32"], FORMATS[f"INT{bits}_G128_FLOAT32"]
    assert source.formats == (row, row if nodes == 1 else part)
    assert (source.num_experts, source.hidden, source.intermediate) == (2, hidden, intermediate)
    assert held_formats(source, METHODS[f"AMXINT{bits}"]) == source.formats
    buffer = ReadBuffer()
    for expert in range(2):
        tensors = source.expert(expert, buffer=buffer)
        for name, fmt in zip(("gate", "up", "down"), (row, row, source.formats.down), strict=True):
            matrix = getattr(tensors, name)
            assert np.allclose(matrix.dequantize(fmt), values[name][expert], rtol=2**-23, atol=0)
    summary = inspect_checkpoint(tmp_path)
    assert summary.problems == () and summary.scheme == "kt-kernel"


@pytest.mark.parametrize(
    ("key", "damage", "message"),
    [
        ("ffn_up_exps.1.numa.1.weight", None, "is missing from"),
        ("ffn_down_exps.0.numa.0.scale", None, "is missing from"),
        ("ffn_up_exps.1.numa.0.weight", lambda t: t[:-64].clone(), r"shape \(16320,\), expected"),
        ("ffn_gate_exps.0.numa.0.weight", lambda t: t[:100].clone(), "100 bytes are no 128 x 256"),
        ("ffn_down_exps.1.numa.1.scale", lambda t: t.half(), "dtype F16, expected F32"),
        ("ffn_down_exps.1.numa.1.weight", lambda t: t.reshape(2, -1), "expected"),
        ("ffn_up_exps.1.numa.1.scale", lambda t: t * float("inf"), "is inf, which is no finite"),
    ],
)  # fmt: skip
def test_damage(key: str, damage: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, 4, 2, 256, 256)
    tensors = load_file(tmp_path / FILE)
    tensor = tensors.pop(f"blk.0.{key}")
    if damage is not None:
        tensors[f"blk.0.{key}"] = damage(tensor)  # type: ignore[operator]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        source = Checkpoint.open(tmp_path).layer(0)
        for expert in range(2):
            source.expert(expert)
    assert f"blk.0.{key}" in str(caught.value)


def test_what_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 4, 1, 128, 128)
    source = Checkpoint.open(tmp_path).layer(0)
    with pytest.raises(ValueError, match=r"reordered by AOCL or KML.*use AMXINT4"):
        held_formats(source, METHODS["MOE_INT4"])
    with pytest.raises(ValueError, match="does not become AMXINT8: use AMXINT4"):
        held_formats(source, METHODS["AMXINT8"])
    with pytest.raises(IndexError, match="there are 2 experts"):
        source.expert(2)
    tensors = load_file(tmp_path / FILE)
    for expert in range(2):
        tensors[f"blk.0.ffn_up_exps.{expert}.numa.0.qzeros"] = torch.zeros(4)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"numa\.0\.qzeros.*not known"):
        Checkpoint.open(tmp_path).layer(0)
