"""A stand-in for `ExpertLayer` on the float64 reference: the wrapper's own logic, without kernels.

It keeps the promises of the real one (inputs captured by `submit`, ids that are nobody's ignored)
and remembers what was asked of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.job import Job
from hybrid_moe.cpu_kernels.streams.graph_job import Report
from hybrid_moe.formats.numbers import bf16_to_f32
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from tests.reference import reference_moe


class FakeJob(Job[Any]):
    """Computes when it is waited for, from what was captured."""

    __slots__ = ("given", "layer", "out", "waited")

    def __init__(self, layer: FakeExpertLayer, given: tuple[Any, Any, Any, Any], out: Any) -> None:
        x, ids, _, skip = given
        valid = (ids >= 0) & (ids < layer.E)
        lost = ids[valid & ~(layer.resident | skip)[np.where(valid, ids, 0)]]
        missing = int(lost[0]) if lost.size else -1
        super().__init__(None, None, len(x), int((~valid).sum()), missing)
        self.layer, self.given, self.out, self.waited = layer, given, out, False

    def wait(self) -> Any:
        self.waited = True
        if self.layer.failure is not None:
            raise RuntimeError(self.layer.failure)
        layer, (x, ids, weights, skip) = self.layer, self.given
        y = reference_moe(
            bf16_to_f32(x),
            ids,
            weights,
            *(layer.stacked(name) for name in ("gate", "up", "down")),
            gate_bias=layer.stacked_bias("gate"),
            up_bias=layer.stacked_bias("up"),
            down_bias=layer.stacked_bias("down"),
            limit=layer.activation.limit,
            alpha=layer.activation.alpha,
            skip=~layer.resident | skip,
        )
        if self.missing < 0:
            bits = y.astype(ml_dtypes.bfloat16).view(np.int16)
            self.out.copy_(torch.from_numpy(bits).view(torch.bfloat16))
        return self.out


class FakeExpertLayer:
    """See `hybrid_moe.cpu_kernels.layer.ExpertLayer`."""

    made: ClassVar[list[FakeExpertLayer]] = []

    def __init__(
        self,
        fmt: WeightFormat | LayerFormats,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        pool: Any,
        activation: Any,
        activation_bits: int = 16,
        isa: str | None = None,
        name: str = "",
    ) -> None:
        self.formats = layer_formats(fmt)
        self.E, self.H, self.I = num_experts, hidden, intermediate
        self.num_experts = num_experts
        self.pool, self.activation, self.isa = pool, activation, isa
        self.activation_bits = activation_bits
        self.resident = np.zeros(num_experts, bool)
        self.tensors: dict[int, ExpertTensors] = {}
        self.jobs: list[FakeJob] = []
        self.failure: str | None = None
        self.closed = False
        FakeExpertLayer.made.append(self)

    @property
    def nbytes(self) -> int:
        gate_up, down = self.formats
        each = 2 * gate_up.nbytes(self.I, self.H) + down.nbytes(self.H, self.I)
        return len(self.tensors) * each

    @property
    def fmt(self) -> WeightFormat:
        return self.formats.gate_up

    def allocate(self, resident: Any, *, biases: bool = True) -> None:
        assert not self.closed and resident.dtype == np.bool_
        self.resident, self.room_for_biases = resident.copy(), biases

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        assert self.resident[expert] and expert not in self.tensors
        matrices = (tensors.gate, tensors.up, tensors.down)
        assert self.room_for_biases == any(m.bias is not None for m in matrices)

        def copied(m: Matrix) -> Matrix:
            planes = {name: plane.copy() for name, plane in m.planes.items()}
            return replace(m, **planes, bias=None if m.bias is None else m.bias.copy())

        self.tensors[expert] = ExpertTensors(
            copied(tensors.gate), copied(tensors.up), copied(tensors.down)
        )

    def stacked(self, name: str) -> Any:
        N, K = (self.H, self.I) if name == "down" else (self.I, self.H)
        result = np.zeros((self.E, N, K))
        for expert, tensors in self.tensors.items():
            matrix: Matrix = getattr(tensors, name)
            fmt = self.formats.down if name == "down" else self.formats.gate_up
            result[expert] = matrix.dequantize(fmt)
        return result

    def stacked_bias(self, name: str) -> Any:
        result = np.zeros((self.E, self.H if name == "down" else self.I))
        for expert, tensors in self.tensors.items():
            bias = getattr(tensors, name).bias
            if bias is not None:
                result[expert] = bias
        return result

    def start(self, batch: Batch, output: Any) -> FakeJob:
        def at(address: int, dtype: Any, *shape: int) -> Any:
            if not all(shape):
                return np.zeros(shape, dtype)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)

        routing = batch.tokens, batch.top_k
        given = (
            at(batch.x, np.uint16, batch.tokens, self.H),
            at(batch.ids, np.int64, *routing),
            at(batch.weights, np.float32, *routing),
            at(batch.skip, np.bool_, self.E),
        )
        assert output.data_ptr() == batch.out and output.is_contiguous()
        self.jobs.append(FakeJob(self, given, output))
        return self.jobs[-1]

    def report(self) -> Report:
        return Report(0, 0, -1)

    def close(self) -> None:
        self.closed = True
        self.tensors.clear()
