"""What a loader hands to a packer: one expert's matrices as its checkpoint stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hybrid_moe.formats.numbers import F32, Array
from hybrid_moe.formats.weight_format import PLANES, Plane, WeightFormat


class CheckpointError(ValueError):
    """A checkpoint is damaged or is not what the caller said; the message names key and file."""


@dataclass(frozen=True)
class Matrix:
    """One projection, row-major over output rows. The arrays may have any strides.

    Attributes:
        codes: [N, units], see `WeightFormat.code_shape` (MXFP4: uint8 [N, K/2]; BF16: uint16
            [N, K]).
        scales: [N, K/group] in the format's scale dtype, see `WeightFormat.scale_shape`; None where
            the format has none.
        bias: float32 [N], added to the product before the activation (gate, up) or before the
            routing weight (down); None for no bias.
        where: tensor key and file, for messages.
        scales_where: the same of the scales where they are a tensor of their own.
        high, minima, factors: further planes, see `WeightFormat.planes`; None where the format has
            none.
        scale_rows: rows that share their scales (FP8: 128).
    """

    codes: Array
    scales: Array | None = None
    bias: F32 | None = None
    where: str = "tensor"
    scales_where: str | None = None
    high: Array | None = None
    minima: Array | None = None
    factors: Array | None = None
    scale_rows: int = 1

    @property
    def planes(self) -> dict[str, Array]:
        """Its arrays by name, biases left out."""
        found = {name: getattr(self, name) for name in PLANES}
        return {name: plane for name, plane in found.items() if plane is not None}

    def dequantize(self, fmt: WeightFormat) -> F32:
        """float32 [N, K], without the bias: see `WeightFormat.dequantize`."""
        return fmt.dequantize(**self.planes)

    def rows(self, rows: slice) -> Matrix:
        """Some of its output rows: views, not copies.

        Raises:
            ValueError: they begin or end within rows that share their scales.
        """
        cut: dict[str, Any] = {}
        for name, plane in self.planes.items():
            shared = self.scale_rows if name == "scales" else 1
            cut[name] = plane[rows] if shared == 1 else plane[self._shared_rows(rows, shared)]
        return replace(self, **cut, bias=None if self.bias is None else self.bias[rows])

    def _shared_rows(self, rows: slice, shared: int) -> slice:
        start, stop, step = rows.indices(len(self.codes))
        if step != 1 or start % shared or (stop % shared and stop < len(self.codes)):
            raise ValueError(
                f"{self.where}: rows {start} to {stop} by {step} are cut out of blocks of {shared} "
                "rows that share their scales"
            )
        return slice(start // shared, -(-stop // shared))

    def split(self, interleaved: bool) -> tuple[Matrix, Matrix]:
        """Gate and up of a fused matrix: every second row, or one half each."""
        if interleaved:
            return self.rows(slice(0, None, 2)), self.rows(slice(1, None, 2))
        half = self.codes.shape[0] // 2
        return self.rows(slice(0, half)), self.rows(slice(half, None))


@dataclass(frozen=True)
class ExpertTensors:
    """gate and up are [intermediate, hidden], down is [hidden, intermediate]."""

    gate: Matrix
    up: Matrix
    down: Matrix


def check_matrix(matrix: Matrix, fmt: WeightFormat, N: int, K: int) -> None:
    """Raise `CheckpointError` unless `matrix` is an N x K matrix of `fmt`."""
    where = matrix.where
    scales_where = matrix.scales_where or where
    codes, scales, bias = matrix.codes, matrix.scales, matrix.bias
    if codes.dtype != fmt.code_dtype:
        raise CheckpointError(
            f"{where}: {fmt.name} codes must be {fmt.code_dtype}, these are {codes.dtype}"
        )
    if codes.shape != fmt.code_shape(N, K):
        raise CheckpointError(
            f"{where}: shape {tuple(codes.shape)}, expected {fmt.code_shape(N, K)} "
            f"for {N} rows of {K} {fmt.name} weights"
        )
    if fmt.scale is None and scales is not None:
        raise CheckpointError(f"{where}: {fmt.name} has no scales, but scales were given")
    for plane in fmt.planes:
        if plane.name != "codes":
            _check_plane(matrix, plane, fmt, N, K)
    if matrix.scale_rows != fmt.scale_rows:
        raise CheckpointError(
            f"{scales_where}: {matrix.scale_rows} rows share their scales, those of {fmt.name} are "
            f"for {fmt.scale_rows}"
        )
    if fmt.scale is not None and scales is not None:
        invalid = fmt.scale.invalid(scales)
        if invalid.any():
            raise CheckpointError(
                f"{scales_where}: a {fmt.scale.name} scale is {scales[invalid][0]}, which is no "
                "finite number; the checkpoint is damaged"
            )
    for name in ("minima", "factors"):
        numbers = getattr(matrix, name)
        if numbers is not None and numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            raise CheckpointError(
                f"{scales_where}: one of the {name} of {fmt.name} is no finite number; "
                "the checkpoint is damaged"
            )
    if bias is not None and bias.shape != (N,):
        raise CheckpointError(f"{where}: bias of shape {tuple(bias.shape)}, expected ({N},)")


def _check_plane(matrix: Matrix, plane: Plane, fmt: WeightFormat, N: int, K: int) -> None:
    """Raise unless a plane beside the codes is there, in its shape and dtype."""
    where = matrix.scales_where or matrix.where
    is_scale = plane.name == "scales"
    what = plane.name if fmt.scale is None or not is_scale else f"{fmt.scale.name} scales"
    given, expected = getattr(matrix, plane.name), plane.shape(N, K)
    if given is None:
        raise CheckpointError(f"{matrix.where}: {fmt.name} needs {what} {expected}")
    if given.shape != expected:
        per = (
            f"{plane.count} per {plane.per} inputs"
            if plane.count > 1
            else (f"one per {plane.per} inputs" if plane.per else "one per row")
        )
        raise CheckpointError(
            f"{where}: {plane.name} of shape {tuple(given.shape)}, expected {expected} ({per})"
        )
    if given.dtype != plane.dtype:
        raise CheckpointError(f"{where}: {what} must be {plane.dtype}, these are {given.dtype}")
