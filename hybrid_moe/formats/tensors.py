"""What a loader hands to a packer: one expert's matrices as its checkpoint stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrid_moe.formats.table import F32, Array, WeightFormat


class CheckpointError(ValueError):
    """A checkpoint is damaged or is not what the caller said; the message names key and file."""


@dataclass(frozen=True)
class Matrix:
    """One projection, row-major over output rows. The arrays may have any strides.

    Attributes:
        codes: [N, units], see `WeightFormat.code_shape` (MXFP4: uint8 [N, K/2]; BF16: uint16
            [N, K]).
        scales: [N, K/group] in the format's scale dtype; None where the format has none.
        bias: float32 [N], added to the product before the activation (gate, up) or before the
            routing weight (down); None for no bias.
        where: tensor key and file, for messages.
        scales_where: the same of the scales where they are a tensor of their own.
    """

    codes: Array
    scales: Array | None = None
    bias: F32 | None = None
    where: str = "tensor"
    scales_where: str | None = None

    def rows(self, rows: slice) -> Matrix:
        """Some of its output rows: views, not copies."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=None if self.scales is None else self.scales[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

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
    expected = fmt.scale_shape(N, K)
    if expected is None:
        if scales is not None:
            raise CheckpointError(f"{where}: {fmt.name} has no scales, but scales were given")
    elif fmt.scale is not None:
        if scales is None:
            raise CheckpointError(f"{where}: {fmt.name} needs {fmt.scale.name} scales {expected}")
        if scales.shape != expected:
            raise CheckpointError(
                f"{scales_where}: scales of shape {tuple(scales.shape)}, expected {expected} "
                f"(one per {fmt.group} inputs)"
            )
        if scales.dtype != fmt.scale.dtype:
            raise CheckpointError(
                f"{scales_where}: {fmt.scale.name} scales must be {fmt.scale.dtype}, "
                f"these are {scales.dtype}"
            )
        invalid = fmt.scale.invalid(scales)
        if invalid.any():
            raise CheckpointError(
                f"{scales_where}: a {fmt.scale.name} scale is {scales[invalid][0]}, which is no "
                "finite number; the checkpoint is damaged"
            )
    if bias is not None and bias.shape != (N,):
        raise CheckpointError(f"{where}: bias of shape {tuple(bias.shape)}, expected ({N},)")
