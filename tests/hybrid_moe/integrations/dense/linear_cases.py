"""Linear layers with random packed weights, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from tests.cpu_kernels.cases import ACTIVATION_ERROR, decode, random_matrix
from tests.reference import Evaluation, evaluate_linear

K, N = 96, 200
"""Sizes of most layers: three strips and eight rows of another."""

WHERE = "model.layers.0.self_attn.q_proj"


@dataclass
class Case:
    """A layer and what it holds.

    Attributes:
        layer: on one thread.
        matrix: what was packed.
        fmt: its format.
    """

    layer: HybridLinear
    matrix: Matrix
    fmt: WeightFormat

    @classmethod
    def random(
        cls,
        fmt: WeightFormat = BF16,
        *,
        rows: int = N,
        inputs: int = K,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        where: str = WHERE,
        threads: int = 1,
    ) -> Case:
        matrix = random_matrix(fmt, np.random.default_rng(seed), rows, inputs, bias)
        packed = PackedMatrix(fmt, rows, inputs, PoolConfig(threads), bias=bias)
        packed.load(matrix)
        return cls(HybridLinear(packed, where, dtype), matrix, fmt)

    @property
    def weight(self) -> torch.Tensor:
        """The values, float64 [N, K], by a decoder that is not the project's."""
        return torch.from_numpy(decode(self.fmt, self.matrix))

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.matrix.bias is None else torch.from_numpy(self.matrix.bias)

    def expected(self, x: torch.Tensor) -> Evaluation:
        """Value and bounds for x [..., K] of BF16 values, as [T, N]."""
        return evaluate_linear(
            x.reshape(-1, x.shape[-1]).double().numpy(),
            self.weight.numpy(),
            self.matrix.bias,
            activation_error=ACTIVATION_ERROR[self.fmt.name],
        )


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random values that are BF16 numbers, in `dtype`."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).bfloat16().to(dtype)
