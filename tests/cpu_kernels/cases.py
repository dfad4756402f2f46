"""Random experts, layers made of them, and the reference's answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.reference import FIXED_POINT_ERROR, Evaluation, evaluate

Array = npt.NDArray[Any]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ACTIVATION_ERROR = {
    MXFP4.name: FIXED_POINT_ERROR,
    INT8.name: FIXED_POINT_ERROR,
    BF16.name: 0.0,
}
"""Format -> what its encoding of activations may lose (kernels/encode.py)."""


def has_portable_bits(fmt: WeightFormat, tier: str) -> bool:
    """Whether the tier has the bits of `portable` where weights, activations and sums are normal
    numbers. Only a matrix unit adds bf16 products in another order (dsl/tiles.py)."""
    return not (TIERS[tier].tiles and fmt.name == BF16.name)


def flushes_subnormals(fmt: WeightFormat, tier: Tier) -> bool:
    """Whether subnormal inputs and sums of the format's products are zero on the tier."""
    return fmt.name == BF16.name and tier.flushes("tile_dot_pairs" if tier.tiles else "pair_dot")


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Round to nearest even; for finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> npt.NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def decode(fmt: WeightFormat, matrix: Matrix) -> npt.NDArray[np.float64]:
    """The matrix in float64, written apart from the project's own dequantizer."""
    if fmt.name == BF16.name:
        return from_bf16(matrix.codes)
    if fmt.name == INT8.name:
        assert matrix.scales is not None
        return matrix.codes.astype(np.float64) * np.repeat(matrix.scales.astype(np.float64), 32, 1)
    assert fmt.name == MXFP4.name and matrix.scales is not None
    nibbles = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1)
    nibbles = nibbles.reshape(len(matrix.codes), -1)
    values = np.where(nibbles & 8, -1.0, 1.0) * _E2M1[nibbles & 7]
    return np.ldexp(values, np.repeat(matrix.scales.astype(np.int64) - 127, 32, axis=1))


def random_matrix(
    fmt: WeightFormat, rng: np.random.Generator, N: int, K: int, bias: bool = False
) -> Matrix:
    """Weights of about 1 / sqrt(K), stored as random codes (all codes, several scales occur)."""
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    if fmt.name == BF16.name:
        return Matrix(to_bf16(rng.standard_normal((N, K)) / np.sqrt(K)), None, b)
    if fmt.name == INT8.name:  # -128 too, which no encoder makes, and scales of both signs
        int8 = rng.integers(-128, 128, (N, K)).astype(np.int8)
        steps = rng.choice([-1, 1], (N, K // 32)) * 2.0 ** rng.uniform(-9, -5, (N, K // 32))
        return Matrix(int8, (steps / np.sqrt(K)).astype(np.float16), b)
    codes = rng.integers(0, 256, (N, K // 2), dtype=np.uint8)
    scales = rng.integers(-3, 2, (N, K // 32)) - round(np.log2(K) / 2) + 127
    return Matrix(codes, scales.astype(np.uint8), b)


def integer_matrix(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Matrix:
    """Weights that are multiples of 1/4 up to 12, so that float32 holds the sums of their products
    with small integers exactly, in any order."""
    if fmt.name == BF16.name:
        return Matrix(to_bf16(rng.integers(-12, 13, (N, K)) / 2), None)
    if fmt.name == INT8.name:
        int8 = rng.integers(-24, 25, (N, K)).astype(np.int8)
        return Matrix(int8, rng.choice([0.25, 0.5, -0.5], (N, K // 32)).astype(np.float16))
    codes = rng.integers(0, 256, (N, K // 2), dtype=np.uint8)
    return Matrix(codes, rng.integers(126, 129, (N, K // 32)).astype(np.uint8))


def random_expert(
    fmt: WeightFormat,
    rng: np.random.Generator,
    H: int,
    I: int,
    bias: bool = False,
) -> ExpertTensors:
    return ExpertTensors(
        random_matrix(fmt, rng, I, H, bias),
        random_matrix(fmt, rng, I, H, bias),
        random_matrix(fmt, rng, H, I, bias),
    )


@dataclass(frozen=True)
class Case:
    """Experts of one layer and how to run them."""

    fmt: WeightFormat
    experts: Sequence[ExpertTensors]
    activation: Activation = field(default_factory=Activation)

    @classmethod
    def random(
        cls,
        fmt: WeightFormat,
        H: int,
        I: int,
        *,
        E: int = 5,
        seed: int = 0,
        bias: bool = False,
        activation: Activation | None = None,
    ) -> Case:
        rng = np.random.default_rng(seed)
        experts = [random_expert(fmt, rng, H, I, bias) for _ in range(E)]
        return cls(fmt, experts, activation or Activation())

    @property
    def E(self) -> int:  # noqa: N802
        return len(self.experts)

    @property
    def H(self) -> int:  # noqa: N802
        return len(self.experts[0].down.codes)

    @property
    def I(self) -> int:  # noqa: N802, E743
        return len(self.experts[0].gate.codes)

    @property
    def biased(self) -> bool:
        """Whether any matrix has a bias."""
        return any(
            matrix.bias is not None for e in self.experts for matrix in (e.gate, e.up, e.down)
        )

    def layer(
        self,
        tier: Tier | str | None = None,
        pool: PoolConfig | None = None,
        only: Sequence[int] | None = None,
        activation_bits: int = 16,
    ) -> ExpertLayer:
        """A layer that holds the experts in `only` (all by default)."""
        layer = ExpertLayer(
            self.fmt,
            self.E,
            self.H,
            self.I,
            pool=pool or PoolConfig(1),
            activation=self.activation,
            activation_bits=activation_bits,
            isa=tier,
        )
        chosen = range(self.E) if only is None else only
        layer.allocate(np.isin(np.arange(self.E), list(chosen)), biases=self.biased)
        for expert in chosen:
            layer.load(expert, self.experts[expert])
        return layer

    def reference(self, x: Array, ids: Array, weights: Array, **options: Any) -> Evaluation:
        """Float64 value and bounds for bf16 bits `x`."""
        stacked = {}
        for name in ("gate", "up", "down"):
            matrices = [getattr(expert, name) for expert in self.experts]
            stacked[name] = np.stack([decode(self.fmt, m) for m in matrices])
            if matrices[0].bias is not None:
                options[f"{name}_bias"] = np.stack([m.bias for m in matrices])
        return evaluate(
            from_bf16(x),
            ids,
            weights,
            **stacked,
            limit=self.activation.limit,
            alpha=self.activation.alpha,
            activation_error=ACTIVATION_ERROR[self.fmt.name],
            **options,
        )

    def with_scales(self, **scales: float) -> Case:
        """The same codes with one scale everywhere in the matrices named."""

        def changed(expert: ExpertTensors) -> ExpertTensors:
            new = {}
            for name, scale in scales.items():
                matrix = getattr(expert, name)
                new[name] = dataclasses.replace(matrix, scales=np.full_like(matrix.scales, scale))
            return dataclasses.replace(expert, **new)

        return dataclasses.replace(self, experts=[changed(e) for e in self.experts])


def random_batch(
    T: int, H: int, E: int, k: int, seed: int = 0, scale: float = 1.0
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """x bf16 bits [T, H], ids [T, k] without repetition in a row, weights [T, k] summing to 1."""
    rng = np.random.default_rng(seed)
    x = to_bf16(rng.standard_normal((T, H)) * scale)
    ids = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :k].astype(np.int64)
    weights = rng.random((T, k)).astype(np.float32) + np.float32(0.1)
    return x, ids, weights / weights.sum(axis=1, keepdims=True)
