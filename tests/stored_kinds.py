"""Small checkpoints of every way in which weights are stored, with the values that they mean.

Nothing here is ours: numbers are decoded by `ml_dtypes`, and bits are packed as the documentation
of each library says it (AutoGPTQ's and AutoAWQ's `QuantLinear.pack`, compressed-tensors'
`pack_to_int32`, ModelOpt's export), written down once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Rng = np.random.Generator
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, F64]
"""Tensors of one matrix by their suffixes, and its weights [N, K]."""

FILE = "model.safetensors"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Kind:
    """One way to store weights.

    Attributes:
        format: name of the format that it is.
        make: makes a matrix of N rows and K inputs.
        method: a method that takes it as it is.
        config: what `config.json` says of it.
        hidden, intermediate: sizes H and I.
        block, names: the experts' names within a layer; of gate, up and down.
        prefix: of the keys.
    """

    format: str
    make: Callable[[Rng, int, int], Made]
    method: str
    config: dict[str, Any] = field(default_factory=dict)
    hidden: int = 256
    intermediate: int = 128
    block: str = "mlp.experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    prefix: str = "model."

    def key(self, expert: int, projection: int, suffix: str, layer: int = 0) -> str:
        """Of a tensor; projections are 0 (gate), 1 and 2 (down)."""
        stem = f"{self.prefix}layers.{layer}.{self.block}.{expert}."
        return f"{stem}{self.names[projection]}{suffix}"

    def shape(self, projection: int) -> tuple[int, int]:
        """N and K of a projection."""
        H, I = self.hidden, self.intermediate
        return (H, I) if projection == 2 else (I, H)


@dataclass(frozen=True)
class Stored:
    """A checkpoint of one layer, or several.

    Attributes:
        folder: where it is.
        gate, up, down: weights of the first layer's experts, [E, N, K].
    """

    folder: Path
    gate: F64
    up: F64
    down: F64


def write(folder: Path, kind: Kind, experts: int = 2, layers: int = 1, seed: int = 0) -> Stored:
    """Write a checkpoint of a kind."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    values: list[list[F64]] = [[], [], []]
    for layer in range(layers):
        for expert in range(experts):
            for projection in range(3):
                made, value = kind.make(rng, *kind.shape(projection))
                for suffix, tensor in made.items():
                    tensors[kind.key(expert, projection, suffix, layer)] = tensor.contiguous()
                if layer == 0:
                    values[projection].append(value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    if kind.config:
        (folder / "config.json").write_text(json.dumps(kind.config))
    return Stored(folder, *map(np.stack, values))


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / FILE, {"format": "pt"})


def _bytes(rng: Rng, *shape: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, shape, np.uint8)


def _nibbles(codes: npt.NDArray[np.uint8]) -> Ints:
    """[..., n] bytes -> [..., 2 n] nibbles, low first."""
    both = np.stack([codes & 15, codes >> 4], axis=-1)
    return both.reshape(*codes.shape[:-1], -1).astype(np.int64)


def _e4m3(rng: Rng, *shape: int) -> npt.NDArray[np.uint8]:
    """Finite E4M3 codes."""
    codes = _bytes(rng, *shape)
    return np.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)


def _float8(codes: npt.NDArray[np.uint8]) -> F64:
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def _bf16(values: Any) -> tuple[torch.Tensor, F64]:
    rounded = torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16)
    return rounded, rounded.double().numpy()


def _scales(rng: Rng, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, F64]:
    """Random scales about 1/64; those of bf16 have its eight bits in every type."""
    values, exact = _bf16(rng.uniform(0.008, 0.03, shape))
    if dtype is torch.float32:  # all 24 bits
        values = torch.from_numpy(rng.uniform(0.008, 0.03, shape).astype(np.float32))
        return values, values.double().numpy()
    if dtype is torch.float8_e8m0fnu:
        raw = rng.integers(119, 123, shape).astype(np.uint8)
        return torch.from_numpy(raw).view(dtype), raw.view(ml_dtypes.float8_e8m0fnu).astype(float)
    return values.to(dtype), exact


def _repeat(scales: F64, group: int) -> F64:
    return np.repeat(scales, group, axis=-1)


def mxfp4(rng: Rng, N: int, K: int) -> Made:
    """As compressed-tensors writes it."""
    codes, raw = _bytes(rng, N, K // 2), rng.integers(119, 125, (N, K // 32)).astype(np.uint8)
    nibbles = _nibbles(codes).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    tensors = {".weight_packed": torch.from_numpy(codes), ".weight_scale": torch.from_numpy(raw)}
    return tensors, nibbles * _repeat(factors, 32)


def nvfp4(rng: Rng, N: int, K: int) -> Made:
    """ModelOpt's: E2M1 * E4M3 * float32 of the tensor; an `input_scale` for activations beside."""
    codes = _bytes(rng, N, K // 2)
    scales = rng.integers(0x20, 0x70, (N, K // 16)).astype(np.uint8)
    factor = np.float32(rng.uniform(1e-3, 3e-3))
    nibbles = _nibbles(codes).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    tensors = {
        ".weight": torch.from_numpy(codes),
        ".weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
        ".weight_scale_2": torch.tensor(factor),
        ".input_scale": torch.tensor(0.5),
    }
    return tensors, nibbles * _repeat(_float8(scales), 16) * np.float64(factor)


def mxfp8(rng: Rng, N: int, K: int) -> Made:
    """MiniMax-M3's: scales are plain bytes."""
    codes, raw = _e4m3(rng, N, K), rng.integers(113, 118, (N, K // 32)).astype(np.uint8)
    factors = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    tensors = {
        ".weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        ".weight_scale_inv": torch.from_numpy(raw),
    }
    return tensors, _float8(codes) * _repeat(factors, 32)


def fp8(dtype: torch.dtype) -> Callable[[Rng, int, int], Made]:
    """DeepSeek-V3's: a scale for 128 x 128 weights, of this type."""

    def make(rng: Rng, N: int, K: int) -> Made:
        codes = _e4m3(rng, N, K)
        scales, values = _scales(rng, dtype, -(-N // 128), -(-K // 128))
        wide = values.repeat(128, axis=0)[:N].repeat(128, axis=1)[:, :K]
        tensors = {
            ".weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
            ".weight_scale_inv": scales,
        }
        return tensors, _float8(codes) * wide

    return make


def fp8_rows(dtype: torch.dtype, shape: Callable[[int], tuple[int, ...]]) -> Any:
    """A scale for each row, GLM's [N, 1] among others, or one for the tensor."""

    def make(rng: Rng, N: int, K: int) -> Made:
        codes = _e4m3(rng, N, K)
        scales, values = _scales(rng, dtype, *shape(N))
        tensors = {
            ".weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
            ".weight_scale": scales,
        }
        return tensors, _float8(codes) * values.reshape(-1, 1)

    return make


def int8_rows(rng: Rng, N: int, K: int) -> Made:
    """compressed-tensors' `int-quantized`: a bf16 scale for each row."""
    codes = rng.integers(-127, 128, (N, K)).astype(np.int8)
    scales, values = _scales(rng, torch.bfloat16, N, 1)
    return {".weight": torch.from_numpy(codes), ".weight_scale": scales}, codes * values


def int8_groups(rng: Rng, N: int, K: int) -> Made:
    """What `hybrid-moe convert` writes."""
    codes = rng.integers(-127, 128, (N, K)).astype(np.int8)
    scales, values = _scales(rng, torch.float16, N, K // 32)
    tensors = {".weight": torch.from_numpy(codes), ".weight_scale": scales}
    return tensors, codes * _repeat(values, 32)


def bf16(rng: Rng, N: int, K: int) -> Made:
    """Plain weights."""
    weights, values = _bf16(rng.standard_normal((N, K)) / 16)
    return {".weight": weights}, values


def _words(values: Ints, axis: int) -> torch.Tensor:
    """Eight values of four bits in an int32, the first in the low bits, along `axis`."""
    moved = np.moveaxis(values, axis, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, 8).astype(np.uint64)
    packed = np.zeros(grouped.shape[:-1], np.uint64)
    for place in range(8):
        packed |= grouped[..., place] << np.uint64(4 * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis).astype(np.uint32)
                                                 .view(np.int32)))  # fmt: skip


def packed_int4(
    group: int | None, dtype: torch.dtype, *, words: bool = True, zeros: bool = False
) -> Callable[[Rng, int, int], Made]:
    """compressed-tensors' `pack-quantized`: values of -8..7, plus 8, in words (or bytes) of a row;
    zero points likewise, in words of eight rows. A group of None is a row."""

    def make(rng: Rng, N: int, K: int) -> Made:
        size = group or K
        signed = rng.integers(-8, 8, (N, K))
        scales, values = _scales(rng, dtype, N, K // size)
        packed = _words(signed + 8, 1)
        tensors = {
            ".weight_packed": packed if words else packed.view(torch.uint8),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor([N, K]),
        }
        point = np.zeros((N, K // size), np.int64)
        if zeros:
            point = rng.integers(-8, 8, point.shape)
            tensors[".weight_zero_point"] = _words(point + 8, 0)
        return tensors, (signed - _repeat(point, size)) * _repeat(values, size)

    return make


def gptq(
    group: int | None, *, symmetric: bool, first: bool = True, order: bool = False
) -> Callable[[Rng, int, int], Made]:
    """AutoGPTQ's: codes [K, N] in words of eight inputs; zero points in words of eight outputs,
    less 1 in the first format. `order`: with the g_idx of groups one after the other."""

    def make(rng: Rng, N: int, K: int) -> Made:
        size = group or K
        codes = rng.integers(0, 16, (K, N))
        scales, values = _scales(rng, torch.float16, K // size, N)
        points = np.full((K // size, N), 8) if symmetric else rng.integers(1, 16, (K // size, N))
        tensors = {
            ".qweight": _words(codes, 0),
            ".qzeros": _words(points - first, 1),
            ".scales": scales,
        }
        if order:
            tensors[".g_idx"] = torch.arange(K, dtype=torch.int32) // size
        weights = (codes - points.repeat(size, 0)) * values.repeat(size, 0)
        return tensors, np.ascontiguousarray(weights.T)

    return make


def awq(group: int) -> Callable[[Rng, int, int], Made]:
    """AutoAWQ's `gemm`: codes [K, N], zero points [K / g, N], both in words of eight outputs whose
    nibble i is of output `AWQ_ORDER[i]`."""

    def reordered(values: Ints) -> torch.Tensor:
        columns = values.reshape(values.shape[0], -1, 8)[:, :, list(AWQ_ORDER)]
        return _words(columns.reshape(values.shape), 1)

    def make(rng: Rng, N: int, K: int) -> Made:
        codes, points = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (K // group, N))
        scales, values = _scales(rng, torch.float16, K // group, N)
        tensors = {
            ".qweight": reordered(codes), ".qzeros": reordered(points), ".scales": scales,
        }  # fmt: skip
        weights = (codes - points.repeat(group, 0)) * values.repeat(group, 0)
        return tensors, np.ascontiguousarray(weights.T)

    return make


def _said(**section: Any) -> dict[str, Any]:
    return {"quantization_config": section}


_GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False}
_MINIMAX: dict[str, Any] = {"block": "block_sparse_moe.experts", "names": ("w1", "w3", "w2")}
_LONG: dict[str, Any] = {"hidden": 256, "intermediate": 256}
_RAGGED: dict[str, Any] = {"hidden": 160, "intermediate": 96}

KINDS: dict[str, Kind] = {
    "mxfp4": Kind("MXFP4", mxfp4, "MXFP4"),
    "nvfp4": Kind("NVFP4", nvfp4, "NVFP4"),
    "mxfp8": Kind("MXFP8", mxfp8, "MXFP8", prefix="language_model.model.", **_MINIMAX),
    "fp8": Kind("FP8", fp8(torch.float32), "FP8"),
    "fp8 ragged": Kind("FP8", fp8(torch.float32), "FP8", **_RAGGED),
    "fp8 e8m0": Kind("FP8", fp8(torch.float8_e8m0fnu), "FP8", **_RAGGED),
    "fp8 bf16": Kind("FP8", fp8(torch.bfloat16), "FP8", **_MINIMAX),
    "fp8 rows": Kind(
        "FP8_PERCHANNEL", fp8_rows(torch.float32, lambda n: (n, 1)), "FP8_PERCHANNEL"
    ),
    "fp8 flat rows": Kind(
        "FP8_PERCHANNEL", fp8_rows(torch.bfloat16, lambda n: (n,)), "FP8_PERCHANNEL"
    ),
    "fp8 tensor": Kind(
        "FP8_PERCHANNEL", fp8_rows(torch.float32, lambda _: ()), "FP8_PERCHANNEL"
    ),
    "int4 32": Kind("INT4_G32_BF16", packed_int4(32, torch.bfloat16), "RAWINT4"),
    "int4 64 bytes": Kind(
        "INT4_G64_BF16", packed_int4(64, torch.bfloat16, words=False), "RAWINT4"
    ),
    "int4 128": Kind("INT4_G128_BF16", packed_int4(128, torch.bfloat16), "RAWINT4"),
    "int4 fp16": Kind("INT4_G32_FP16", packed_int4(32, torch.float16), "RAWINT4"),
    "int4 rows": Kind(
        "INT4_ROW_FLOAT32", packed_int4(None, torch.float32), "AMXINT4", intermediate=192
    ),
    "int4 zeros": Kind(
        "INT4_G128_FP16_Z0", packed_int4(128, torch.bfloat16, zeros=True), "AWQ"
    ),
    "gptq": Kind(
        "INT4_G128_FP16", gptq(128, symmetric=True), "GPTQ_INT4", _said(**_GPTQ, sym=True)
    ),
    "gptq 2": Kind(
        "INT4_G32_FP16", gptq(32, symmetric=True, first=False), "GPTQ_INT4",
        _said(**_GPTQ, sym=True, checkpoint_format="gptq_v2"),
    ),
    "gptq rows": Kind(
        "INT4_ROW_FP16", gptq(None, symmetric=True), "GPTQ_INT4", _said(**_GPTQ, sym=True),
        hidden=384, intermediate=192,
    ),
    "gptq zeros": Kind(
        "INT4_G64_FP16_Z1", gptq(64, symmetric=False, order=True), "GPTQ_INT4",
        _said(**_GPTQ, sym=False),
    ),
    "gptq zeros 2": Kind(
        "INT4_G128_FP16_Z0", gptq(128, symmetric=False, first=False), "GPTQ_INT4",
        _said(**_GPTQ, sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq 256": Kind("INT4_G256_FP16_Z1", gptq(256, symmetric=False), "GPTQ_INT4", **_LONG),
    "awq": Kind(
        "INT4_G128_FP16_Z0", awq(128), "AWQ",
        _said(quant_method="awq", bits=4, version="gemm", zero_point=True),
    ),
    "awq 32": Kind("INT4_G32_FP16_Z0", awq(32), "AWQ"),
    "int8 rows": Kind("INT8_ROW_FLOAT32", int8_rows, "AMXINT8"),
    "int8": Kind("INT8", int8_groups, "INT8"),
    "bf16": Kind("BF16", bf16, "BF16"),
}  # fmt: skip
"""Every kind by name."""
