"""The types of ggml's tensors: how many weights a block has, in how many bytes, and our format.

Source: `enum ggml_type` in ggml.h and the sizes of the blocks in ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hybrid_moe.formats.ggml import GGML
from hybrid_moe.formats.integers import GPTQ_SYMMETRIC, INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class GgmlType:
    """One type of tensors.

    Attributes:
        number: in the files.
        name: ggml's.
        weights: of a block; 1 for plain numbers.
        nbytes: of a block.
        raw: NumPy dtype of plain numbers (bf16 as uint16); bytes for blocks.
        format: in which experts stored so are handed on; None where they are not read.
    """

    number: int
    name: str
    weights: int
    nbytes: int
    raw: np.dtype[np.generic]
    format: WeightFormat | None


_FORMATS: Mapping[str, WeightFormat] = {
    **{fmt.name: fmt for fmt in GGML},
    "Q4_0": GPTQ_SYMMETRIC[0],
    "Q8_0": INT8,
    "MXFP4": MXFP4,
    **dict.fromkeys(("BF16", "F16", "F32"), BF16),
}


def _type(number: int, name: str, weights: int, nbytes: int, raw: str = "u1") -> GgmlType:
    return GgmlType(number, name, weights, nbytes, np.dtype(raw), _FORMATS.get(name))


GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        row.number: row
        for row in (
            _type(0, "F32", 1, 4, "<f4"),
            _type(1, "F16", 1, 2, "<f2"),
            _type(2, "Q4_0", 32, 18),
            _type(3, "Q4_1", 32, 20),
            _type(6, "Q5_0", 32, 22),
            _type(7, "Q5_1", 32, 24),
            _type(8, "Q8_0", 32, 34),
            _type(9, "Q8_1", 32, 40),
            _type(10, "Q2_K", 256, 84),
            _type(11, "Q3_K", 256, 110),
            _type(12, "Q4_K", 256, 144),
            _type(13, "Q5_K", 256, 176),
            _type(14, "Q6_K", 256, 210),
            _type(15, "Q8_K", 256, 292),
            _type(16, "IQ2_XXS", 256, 66),
            _type(17, "IQ2_XS", 256, 74),
            _type(18, "IQ3_XXS", 256, 98),
            _type(19, "IQ1_S", 256, 50),
            _type(20, "IQ4_NL", 32, 18),
            _type(21, "IQ3_S", 256, 110),
            _type(22, "IQ2_S", 256, 82),
            _type(23, "IQ4_XS", 256, 136),
            _type(24, "I8", 1, 1, "i1"),
            _type(25, "I16", 1, 2, "<i2"),
            _type(26, "I32", 1, 4, "<i4"),
            _type(27, "I64", 1, 8, "<i8"),
            _type(28, "F64", 1, 8, "<f8"),
            _type(29, "IQ1_M", 256, 56),
            _type(30, "BF16", 1, 2, "<u2"),
            _type(34, "TQ1_0", 256, 54),
            _type(35, "TQ2_0", 256, 66),
            _type(39, "MXFP4", 32, 17),
            _type(40, "NVFP4", 64, 36),
            _type(41, "Q1_0", 128, 18),
        )
    }
)
"""By number."""

TYPES_BY_NAME: Mapping[str, GgmlType] = MappingProxyType(
    {row.name: row for row in GGML_TYPES.values()}
)

REMOVED = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Numbers of types that ggml once had."""

READ = tuple(row.name for row in GGML_TYPES.values() if row.format is not None)
"""Names of the types of which experts are read."""
