"""A stand-in for `ExpertLayer` on the float64 reference: the wrapper's own logic, without kernels.

It keeps the promises of the real one (inputs captured by `submit`, ids that are nobody's ignored)
and remembers what was asked of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from hybrid_moe.formats.table import WeightFormat, bf16_to_f32
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from tests.reference import reference_moe


@dataclass
class FakeJob:
    """Computes when it is waited for, from what was captured."""

    layer: FakeExpertLayer
    x: Any
    ids: Any
    weights: Any
    skip: Any
    waited: bool = False

    def wait(self) -> Any:
        self.waited = True
        if self.layer.failure is not None:
            raise RuntimeError(self.layer.failure)
        layer = self.layer
        absent = ~layer.resident if self.skip is None else ~layer.resident | self.skip
        y = reference_moe(
            bf16_to_f32(self.x),
            self.ids,
            self.weights,
            *(layer.stacked(name) for name in ("gate", "up", "down")),
            gate_bias=layer.stacked_bias("gate"),
            up_bias=layer.stacked_bias("up"),
            down_bias=layer.stacked_bias("down"),
            limit=layer.activation.limit,
            alpha=layer.activation.alpha,
            skip=absent,
        )
        return y.astype(ml_dtypes.bfloat16).view(np.uint16)


@dataclass
class FakePass:
    """See `hybrid_moe.cpu_kernels.small.SmallPass`."""

    job: FakeJob
    out: Any
    ignored: int
    missing: int

    def wait(self) -> None:
        if self.missing < 0:
            self.out[:] = self.job.wait()


class FakeExpertLayer:
    """See `hybrid_moe.cpu_kernels.layer.ExpertLayer`."""

    made: ClassVar[list[FakeExpertLayer]] = []

    def __init__(
        self,
        fmt: WeightFormat,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        pool: Any,
        activation: Any,
        isa: str | None = None,
    ) -> None:
        self.fmt, self.E, self.H, self.I = fmt, num_experts, hidden, intermediate
        self.pool, self.activation, self.isa = pool, activation, isa
        self.resident = np.zeros(num_experts, bool)
        self.tensors: dict[int, ExpertTensors] = {}
        self.jobs: list[FakeJob] = []
        self.failure: str | None = None
        self.closed = False
        FakeExpertLayer.made.append(self)

    @property
    def nbytes(self) -> int:
        return len(self.tensors) * 3 * self.fmt.nbytes(self.H, self.I)

    def allocate(self, resident: Any) -> None:
        assert not self.closed and resident.dtype == np.bool_
        self.resident = resident.copy()

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        assert self.resident[expert] and expert not in self.tensors

        def copied(m: Matrix) -> Matrix:
            scales = None if m.scales is None else m.scales.copy()
            return Matrix(m.codes.copy(), scales, None if m.bias is None else m.bias.copy())

        self.tensors[expert] = ExpertTensors(
            copied(tensors.gate), copied(tensors.up), copied(tensors.down)
        )

    def stacked(self, name: str) -> Any:
        N, K = (self.H, self.I) if name == "down" else (self.I, self.H)
        result = np.zeros((self.E, N, K))
        for expert, tensors in self.tensors.items():
            matrix: Matrix = getattr(tensors, name)
            result[expert] = self.fmt.dequantize(matrix.codes, matrix.scales)
        return result

    def stacked_bias(self, name: str) -> Any:
        result = np.zeros((self.E, self.H if name == "down" else self.I))
        for expert, tensors in self.tensors.items():
            bias = getattr(tensors, name).bias
            if bias is not None:
                result[expert] = bias
        return result

    def submit(self, x: Any, ids: Any, weights: Any, skip: Any = None) -> FakeJob:
        assert (x.dtype, ids.dtype, weights.dtype) == (np.uint16, np.int64, np.float32)
        assert x.shape == (len(ids), self.H) and ids.shape == weights.shape
        assert all(array.flags.c_contiguous for array in (x, ids, weights))
        job = FakeJob(
            self, x.copy(), ids.copy(), weights.copy(), None if skip is None else skip.copy()
        )
        self.jobs.append(job)
        return job

    def small(
        self,
        tokens: int,
        top_k: int,
        x: int,
        ids: int,
        weights: int,
        skip: int,
        out: int,
        owned: object,
    ) -> FakePass:
        def at(address: int, dtype: Any, *shape: int) -> Any:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            buffer = (ctypes.c_char * size).from_address(address)
            return np.frombuffer(buffer, dtype).reshape(shape)

        given = at(ids, np.int64, tokens, top_k)
        masked = at(skip, np.bool_, self.E)
        valid = (given >= 0) & (given < self.E)
        lost = valid & ~(self.resident | masked)[np.where(valid, given, 0)]
        job = self.submit(
            at(x, np.uint16, tokens, self.H),
            given,
            at(weights, np.float32, tokens, top_k),
            masked,
        )
        missing = int(given[lost][0]) if lost.any() else -1
        return FakePass(job, at(out, np.uint16, tokens, self.H), int((~valid).sum()), missing)

    def close(self) -> None:
        self.closed = True
        self.tensors.clear()
