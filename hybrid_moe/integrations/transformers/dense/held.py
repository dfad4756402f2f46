"""The packed matrix of a linear layer, under the name of the module that it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.locks import ProcessLock
from hybrid_moe.logs import warn_once
from hybrid_moe.text import format_bytes

_ROWS = 16 * STRIP_ROWS
"""Rows that are converted at a time: float32 of 1024 rows of 4096 inputs are 16 MiB."""

_KIND = ("fmt", "rows", "inputs", "has_bias", "pool")
"""What is equal of matrices that can stand for each other."""

_change = ProcessLock()
"""Who puts another matrix or layer in the place of one."""


class HeldMatrix:
    """A packed matrix and what computes with it; a linear layer, its `weight` and a tied embedding
    share one. The strips of a loaded matrix never change: `load` puts another matrix in its place,
    so that a job under way, and a copy of the model, keep the one that they have.

    Attributes:
        matrix: the packed matrix.
        where: name of the module, for messages.
        dtype: of the weight as torch sees it, and of an embedding's rows.
        layer: computes with `matrix` alone; None until it is first needed.
    """

    __slots__ = ("dtype", "layer", "matrix", "where")

    def __init__(self, matrix: PackedMatrix, where: str, dtype: torch.dtype) -> None:
        self.matrix, self.where, self.dtype = matrix, where, dtype
        self.layer: DenseLayer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldMatrix:
        """The strips are shared: they never change."""
        made = HeldMatrix(self.matrix, self.where, self.dtype)
        made.layer = self.layer
        return made

    def open(self) -> DenseLayer:
        """`layer`, made if need be.

        Raises:
            RuntimeError: the matrix has not been loaded, or is closed.
        """
        with _change:
            if self.layer is None:
                if not self.matrix.loaded:
                    raise RuntimeError(f"{self.where}: forward before its weights are loaded")
                self.layer = DenseLayer([self.matrix], name=self.where)
            return self.layer

    def _readable(self) -> PackedMatrix:
        matrix = self.matrix
        if not matrix.loaded:
            raise RuntimeError(f"{self.where}: read before its weights are loaded")
        return matrix

    @property
    def weight_nbytes(self) -> int:
        """Of the whole weight as torch would hold it."""
        return self.matrix.rows * self.matrix.inputs * self.dtype.itemsize

    def weight(self) -> torch.Tensor:
        """[N, K] in `dtype`, unpacked anew by every call; quantised weights are dequantised."""
        matrix = self._readable()
        warn_once(
            f"{self.where}: its packed weight is read, which unpacks it into "
            f"{format_bytes(self.weight_nbytes)} each time (said once)"
        )
        return _to_torch(matrix.unpack(), matrix, self.dtype)

    def rows(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Rows of the weight, [n, K] in `dtype`.

        Raises:
            IndexError: there is no such row.
        """
        matrix = self._readable()
        return _to_torch(matrix.take_rows(ids), matrix, self.dtype)

    def bias(self) -> torch.Tensor:
        """[N] in `dtype`; zeros where there is none."""
        return torch.from_numpy(self.matrix.bias[: self.matrix.rows].copy()).to(self.dtype)

    def share(self, matrix: PackedMatrix) -> bool:
        """Take another packed matrix, if it is of the same kind: no weight is copied."""
        if any(getattr(matrix, name) != getattr(self.matrix, name) for name in _KIND):
            return False
        with _change:
            self.matrix, self.layer = matrix, None
        return True

    def load(self, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> None:
        """Pack another weight, another bias or both. A job under way computes with the old ones.
        What is not BF16 is rounded to it, and to the strips' format if that is another, which is
        logged once.

        Args:
            weight: [N, K], any float dtype; None to keep the one that is there.
            bias: [N] likewise.

        Raises:
            ValueError: another shape or kind of tensor than described; a value that the format
                cannot hold; a missing half of a matrix that has not been loaded.
        """
        with _change:
            old = self.matrix
            shapes = {"weight": (weight, (old.rows, old.inputs)), "bias": (bias, (old.rows,))}
            for name, (given, shape) in shapes.items():
                self._check(name, given, shape)
            if bias is not None and not old.has_bias:
                raise ValueError(f"{self.where}: a bias was given, and the layer has none")
            if not old.loaded and (weight is None or (old.has_bias and bias is None)):
                raise ValueError(f"{self.where}: the first weights must be whole, with the bias")
            biases = self._biases(bias)
            new = old
            if old.loaded:
                new = PackedMatrix(old.fmt, old.rows, old.inputs, old.pool, bias=old.has_bias)
            if weight is None:
                kept = old.unpack()
                new.load(Matrix(kept.codes, kept.scales, biases, self.where))
            else:
                self._say_rounding(weight)
                for first in range(0, old.rows, _ROWS):
                    last = min(first + _ROWS, old.rows)
                    part = None if biases is None else biases[first:last]
                    try:
                        codes, scales = _encoded(weight[first:last], old.fmt)
                    except ValueError as error:
                        raise ValueError(f"{self.where}: {error}") from error
                    new.load(Matrix(codes, scales, part, self.where), first)
            self.matrix, self.layer = new, DenseLayer([new], name=self.where)

    def _check(self, name: str, given: torch.Tensor | None, shape: tuple[int, ...]) -> None:
        if given is None:
            return
        if tuple(given.shape) != shape:
            raise ValueError(
                f"{self.where}: a {name} of shape {tuple(given.shape)}, expected {shape}"
            )
        if not given.is_floating_point() or given.layout is not torch.strided or given.is_meta:
            raise ValueError(
                f"{self.where}: a {name} must be a dense float tensor with values, not "
                f"{given.dtype}, {given.layout}, on {given.device}"
            )

    def _biases(self, given: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
        """Those of the new matrix."""
        if not self.matrix.has_bias:
            return None
        if given is None:
            kept: npt.NDArray[np.float32] = self.matrix.bias[: self.matrix.rows].copy()
            return kept
        values: npt.NDArray[np.float32] = given.detach().to("cpu", torch.float32).numpy()
        return values

    def _say_rounding(self, weight: torch.Tensor) -> None:
        fmt = self.matrix.fmt
        if fmt is not BF16 or weight.dtype is not torch.bfloat16:
            warn_once(f"{self.where}: a {weight.dtype} weight was loaded and rounded to {fmt.name}")


def _to_torch(rows: Matrix, of: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The values of unpacked rows."""
    if of.fmt is BF16:
        return torch.from_numpy(rows.codes.view(np.int16)).view(torch.bfloat16).to(dtype)
    n = len(rows.codes)
    values = torch.empty((n, of.inputs), dtype=dtype, device="cpu")
    for first in range(0, n, _ROWS):
        part = rows.rows(slice(first, first + _ROWS))
        floats = of.fmt.dequantize(part.codes, part.scales)
        values[first : first + _ROWS] = torch.from_numpy(floats)
    return values


def _encoded(weight: torch.Tensor, fmt: WeightFormat) -> tuple[Array, Array | None]:
    """Codes and scales of rows of a weight."""
    if fmt is BF16:
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        return rounded.view(torch.int16).numpy().view(np.uint16), None
    return fmt.encode(weight.detach().to("cpu", torch.float32).contiguous().numpy())
