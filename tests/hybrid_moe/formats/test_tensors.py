"""What `check_matrix` lets through, and what it says of the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError, Matrix, check_matrix
from hybrid_moe.formats.weight_format import WeightFormat

N, K = 4, 64
FOUR_BIT = Matrix(
    np.zeros((N, 32), np.uint8), np.full((N, 2), 127, np.uint8), np.zeros(N, np.float32), "w.weight"
)
SIXTEEN_BIT = Matrix(np.zeros((N, K), np.uint16), where="w.weight")

BAD: dict[str, tuple[WeightFormat, Matrix, str]] = {
    "codes of another dtype": (
        MXFP4,
        replace(FOUR_BIT, codes=FOUR_BIT.codes.astype(np.int16)),
        r"w\.weight: MXFP4 codes must be uint8, these are int16",
    ),
    "codes of another shape": (
        MXFP4,
        replace(FOUR_BIT, codes=FOUR_BIT.codes[:, :-1]),
        r"w\.weight: shape \(4, 31\), expected \(4, 32\)",
    ),
    "no scales": (MXFP4, replace(FOUR_BIT, scales=None), r"w\.weight: MXFP4 needs ue8m0 scales"),
    "one group too few": (
        MXFP4,
        replace(FOUR_BIT, scales=np.full((N, 1), 127, np.uint8)),
        r"w\.weight: scales of shape \(4, 1\), expected \(4, 2\)",
    ),
    "scales of another dtype": (
        MXFP4,
        replace(FOUR_BIT, scales=np.full((N, 2), 1.0, np.float32), scales_where="w.scale"),
        r"w\.scale: ue8m0 scales must be uint8, these are float32",
    ),
    "a NaN scale": (
        MXFP4,
        replace(FOUR_BIT, scales=np.full((N, 2), 255, np.uint8), scales_where="w.scale"),
        r"w\.scale: a ue8m0 scale is 255",
    ),
    "bias of another shape": (
        MXFP4,
        replace(FOUR_BIT, bias=np.zeros(N + 1, np.float32)),
        r"w\.weight: bias of shape \(5,\), expected \(4,\)",
    ),
    "scales of a format without": (
        BF16,
        replace(SIXTEEN_BIT, scales=np.zeros((N, 2), np.uint8)),
        r"w\.weight: BF16 has no scales",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrix(name: str) -> None:
    fmt, matrix, message = BAD[name]
    with pytest.raises(CheckpointError, match=message):
        check_matrix(matrix, fmt, N, K)


@pytest.mark.parametrize(("fmt", "matrix"), [(MXFP4, FOUR_BIT), (BF16, SIXTEEN_BIT)])
def test_good_matrix(fmt: WeightFormat, matrix: Matrix) -> None:
    assert fmt in DENSE_FORMATS.values()
    check_matrix(matrix, fmt, N, K)
