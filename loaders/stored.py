"""In which ways checkpoints store the weights of each format, as a table.

One format is stored in several ways: MXFP4 codes are int8 in DeepSeek-V4, uint8 in gpt-oss and F4
in newer files; E8M0 scales are F8_E8M0 or plain bytes. And one pair of dtypes means several
formats, which the shape of the scales tells apart: E4M3 codes have a scale for 32 inputs (MXFP8),
for blocks of 128 x 128 (FP8), for a row, or for the tensor. INT8 is what `convert` writes: nobody
else publishes int8 codes with fp16 scales for groups of 32.

Sources: the indices of DeepSeek-V3 and V4, gpt-oss, MiniMax-M3, GLM-4.7-FP8 and Kimi-K2; ModelOpt's
export of NVFP4; compressed-tensors' `pack-quantized`; AutoGPTQ's and AutoAWQ's `QuantLinear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid_moe.formats.float8 import FP8, FP8_PERCHANNEL
from hybrid_moe.formats.integers import (
    GPTQ_FIRST,
    GPTQ_SYMMETRIC,
    INT4_ROW,
    INT8,
    INT8_ROW,
    RAW_INT4,
    ZERO_POINTS,
)
from hybrid_moe.formats.mx import MXFP4, MXFP8, NVFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.quantization import Quantization

Packing = Literal["rows", "compressed-tensors", "gptq", "awq"]
"""How matrices lie in a file: output rows of inputs; the same in 32-bit words; GPTQ's words of
eight inputs [K / 8, N]; AWQ's words of eight outputs [K, N / 8]."""

_WORD = 8
"""Codes of four bits in a word of 32."""
_BYTES = ("U8", "I8", "F4")
_E8M0 = ("F8_E8M0", "U8")
_FLOATS = ("BF16", "F16", "F32")
_CODES = {"compressed-tensors": (".weight_packed",), "gptq": (".qweight",), "awq": (".qweight",)}
"""Suffixes of the codes where they are part of the packing."""


@dataclass(frozen=True)
class Stored:
    """One way in which a checkpoint stores a matrix of N rows and K inputs.

    Attributes:
        format: the format in which weights are handed on.
        dtypes: safetensors dtypes of the codes.
        scales: safetensors dtypes of the scales; empty where there are none.
        packing: how the matrix lies in the file.
        zeros: whether it has zero points; None: it may have some, all in the middle.
        exact: codes are handed on as they are; else they are rounded to `format`.
    """

    format: WeightFormat
    dtypes: tuple[str, ...]
    scales: tuple[str, ...] = ()
    packing: Packing = "rows"
    zeros: bool | None = False
    exact: bool = True

    @property
    def inputs_first(self) -> bool:
        """Whether scales are [K / group, N], and zero points likewise."""
        return self.packing in ("gptq", "awq")

    def takes(self, key: str, dtype: str, scale: str | None, zeros: bool) -> bool:
        """Whether tensors of these dtypes may mean it.

        Args:
            key: of the codes.
            dtype, scale: of the codes and their scales; None without scales.
            zeros: there are zero points.
        """
        return (
            self.has_codes(key, dtype)
            and (scale in self.scales if scale else not self.scales)
            and (self.zeros is None or self.zeros is zeros)
        )

    def has_codes(self, key: str, dtype: str) -> bool:
        """Whether its codes may be this tensor."""
        endings = _CODES.get(self.packing)
        return dtype in self.dtypes and (endings is None or key.endswith(endings))

    def says(self, quantization: Quantization) -> bool:
        """Whether the configuration agrees, of those that differ in nothing else."""
        if self.packing != "gptq":
            return True
        if quantization.symmetric or self.zeros is None:
            return self.zeros is None and quantization.symmetric is True
        return self.format in (GPTQ_FIRST if quantization.zeros_offset else ZERO_POINTS)

    def code_shape(self, N: int, K: int, dtype: str) -> tuple[int, int]:
        """Of the codes, as raw elements of `dtype`."""
        if self.packing == "gptq":
            return K // _WORD, N
        if self.packing == "awq":
            return K, N // _WORD
        return N, K // self._per_element(dtype)

    def sizes(self, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
        """N and K of codes of that shape (its last two axes): the inverse of `code_shape`."""
        rows, columns = shape[-2:]
        if self.packing == "gptq":
            return columns, rows * _WORD
        if self.packing == "awq":
            return columns * _WORD, rows
        return rows, columns * self._per_element(dtype)

    def _per_element(self, dtype: str) -> int:
        if self.format.bits != 4:
            return 1
        return _WORD if dtype == "I32" else 2

    def scale_shapes(self, N: int, K: int) -> tuple[tuple[int, ...], ...]:
        """What the scales' shape may be; the first is the usual one."""
        shape = self.format.scale_shape(N, K)
        if shape is None:
            return ()
        if self.inputs_first:
            return (shape[::-1],)
        if self.format.group or self.format.scale_rows > 1:
            return (shape,)
        whole = ((), (1,)) if self.format is FP8_PERCHANNEL else ()
        return shape, (N,), *whole

    def zeros_shape(self, N: int, K: int) -> tuple[int, int]:
        """Of the zero points, as words."""
        groups = K // (self.format.group or K)
        return (groups, N // _WORD) if self.inputs_first else (N // _WORD, groups)


STORED: tuple[Stored, ...] = (
    Stored(MXFP4, _BYTES, _E8M0),
    Stored(NVFP4, _BYTES, ("F8_E4M3",)),
    Stored(INT8, ("I8",), ("F16",)),
    Stored(INT8_ROW, ("I8",), ("F32", "BF16", "F16")),
    Stored(FP8, ("F8_E4M3",), ("F32", "BF16", "F16", "F8_E8M0", "U8")),
    Stored(MXFP8, ("F8_E4M3",), ("U8", "F8_E8M0")),
    Stored(FP8_PERCHANNEL, ("F8_E4M3",), _FLOATS),
    # before groups: a row may be as long as one
    Stored(INT4_ROW, ("I32", "U8"), ("F32",), "compressed-tensors"),
    *(Stored(f, ("I32", "U8"), ("BF16", "F32"), "compressed-tensors") for f in RAW_INT4),
    *(Stored(f, ("I32", "U8"), ("F16",), "compressed-tensors") for f in GPTQ_SYMMETRIC),
    Stored(INT4_ROW, ("I32", "U8"), ("BF16",), "compressed-tensors"),
    *(Stored(f, ("I32", "U8"), _FLOATS, "compressed-tensors", True) for f in ZERO_POINTS),
    *(Stored(f, ("I32",), _FLOATS, "gptq", None) for f in GPTQ_SYMMETRIC),
    *(Stored(f, ("I32",), _FLOATS, "gptq", True) for f in (*GPTQ_FIRST, *ZERO_POINTS)),
    *(Stored(f, ("I32",), _FLOATS, "awq", True) for f in ZERO_POINTS),
    Stored(BF16, ("BF16",)),
    Stored(BF16, ("F32", "F16"), exact=False),
)
"""Where dtypes and shapes fit several rows, the first."""


def describe_dtypes(dtype: str, scale: str | None) -> str:
    """The pair in words, for messages."""
    return f"{dtype} with {scale} scales" if scale else f"{dtype} without scales"


def known_dtypes() -> str:
    """Every pair of the table in words, for messages."""
    found: dict[str, list[str]] = {}
    for row in STORED:
        pair = "/".join(row.dtypes) + (f" with {'/'.join(row.scales)} scales" if row.scales else "")
        names = found.setdefault(pair, [])
        names.append(row.format.name)
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {pair}" for pair, names in found.items())
