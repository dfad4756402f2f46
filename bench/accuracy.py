"""How far CPU layers are from float64: on the same dequantized weights, and on those before.

    python bench/accuracy.py
    python bench/accuracy.py --hidden 512 --intermediate 256      # seconds

The figure is ||y - reference|| / ||reference|| over all tokens, of an MoE layer and of one linear
layer. Of the latter also against the weights before they were rounded to the format: with random
weights, what a quantized `dense` loses in a layer. Inputs are standard normal
("normal") or the same with 8 channels 40 times as large ("outliers", as trained models have them);
weights are normal with variance 1 / K; routing is uniform. Beside it stands the floor: the float64
result rounded once to bf16, which no output in bf16 can beat. See docs/numerics.md.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
from problem import expert_output, relative_error
from rich.console import Console
from tables import number, show, text

from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.numbers import bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.quantize import encode

F64 = npt.NDArray[np.float64]
OUTLIERS, OUTLIER_SCALE = 8, 40.0


def random_matrix(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Matrix:
    """N x K weights of variance 1 / K in `fmt`."""
    weights = rng.standard_normal((N, K), np.float32) / np.float32(np.sqrt(K))
    codes, scales = encode(fmt, weights)
    return Matrix(codes, scales)


def random_expert(fmt: WeightFormat, seed: tuple[int, int], H: int, I: int) -> ExpertTensors:
    """Made anew from its seed when it is needed, so that one expert at a time is in memory."""
    rng = np.random.default_rng(seed)
    shapes = ((I, H), (I, H), (H, I))
    return ExpertTensors(*(random_matrix(fmt, rng, N, K) for N, K in shapes))


def random_inputs(rng: np.random.Generator, T: int, K: int) -> dict[str, npt.NDArray[np.uint16]]:
    """Name -> bf16 bits [T, K]."""
    normal = rng.standard_normal((T, K), np.float32)
    outliers = normal.copy()
    outliers[:, rng.choice(K, OUTLIERS, replace=False)] *= OUTLIER_SCALE
    return {"normal": f32_to_bf16(normal), "outliers": f32_to_bf16(outliers)}


def measure(fmt: WeightFormat, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Name of the inputs -> (error of the kernels, error of the rounded float64 result)."""
    H, I, E, k, T = args.hidden, args.intermediate, args.experts, args.top_k, args.tokens
    rng = np.random.default_rng(args.seed)
    inputs = random_inputs(rng, T, H)
    ids = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :k].astype(np.int64)
    weights = rng.random((T, k), np.float32)
    weights /= weights.sum(axis=1, keepdims=True)

    layer = ExpertLayer(fmt, E, H, I, pool=PoolConfig(args.threads), isa=args.isa)
    layer.allocate(np.ones(E, np.bool_), biases=False)
    references: dict[str, F64] = {name: np.zeros((T, H)) for name in inputs}
    for e in range(E):
        expert = random_expert(fmt, (args.seed, e), H, I)
        layer.load(e, expert)
        tokens, slots = np.nonzero(ids == e)
        dense = [
            fmt.dequantize(m.codes, m.scales).astype(np.float64)
            for m in (expert.gate, expert.up, expert.down)
        ]
        for name, x in inputs.items():
            y = expert_output(bf16_to_f32(x[tokens]).astype(np.float64), *dense)
            references[name][tokens] += weights[tokens, slots, None].astype(np.float64) * y
    errors = {}
    for name, x in inputs.items():
        out, reference = bf16_to_f32(layer.forward(x, ids, weights)), references[name]
        rounded = bf16_to_f32(f32_to_bf16(reference.astype(np.float32)))
        errors[name] = (relative_error(out, reference), relative_error(rounded, reference))
    layer.close()
    return errors


def measure_linear(fmt: WeightFormat, args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Name of the inputs -> errors of a linear layer [intermediate, hidden]: of the kernels, of the
    rounded float64 result, and of the kernels against the weights before rounding."""
    N, K, T = args.intermediate, args.hidden, args.tokens
    rng = np.random.default_rng(args.seed)
    weights = rng.standard_normal((N, K), np.float32) / np.float32(np.sqrt(K))
    matrix = Matrix(*encode(fmt, weights))
    packed = PackedMatrix(fmt, N, K, PoolConfig(args.threads))
    packed.load(matrix)
    dequantized = fmt.dequantize(matrix.codes, matrix.scales).astype(np.float64)
    errors = {}
    for name, x in random_inputs(rng, T, K).items():
        layer = DenseLayer([packed], isa=args.isa)
        out = bf16_to_f32(layer.forward(x)[0])
        exact = bf16_to_f32(x).astype(np.float64)
        reference = exact @ dequantized.T
        rounded = bf16_to_f32(f32_to_bf16(reference.astype(np.float32)))
        before = exact @ weights.astype(np.float64).T
        errors[name] = tuple(
            relative_error(y, ref)
            for y, ref in ((out, reference), (rounded, reference), (out, before))
        )
        layer.close()
    packed.close()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 4096),
        ("intermediate", 2048),
        ("experts", 8),
        ("top-k", 4),
        ("tokens", 16),
        ("threads", 1),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--isa", help="instruction set tier; default: the best one")
    args = parser.parse_args()
    points = [
        {"method": fmt.name, "inputs": name, "error": error, "floor": floor}
        for fmt in DENSE_FORMATS.values()
        for name, (error, floor) in measure(fmt, args).items()
    ]
    columns = (
        text("method", "{method}"),
        text("inputs", "{inputs}"),
        number("hybrid_moe", "error", 5),
        number("bf16 floor", "floor", 5),
    )
    title = f"relative l2 error against float64, tier {choose_tier(args.isa).name}"
    show(Console(), f"MoE layer, {title}", columns, points)
    points = [
        {"method": fmt.name, "inputs": name, "error": error, "floor": floor, "before": before}
        for fmt in DENSE_FORMATS.values()
        for name, (error, floor, before) in measure_linear(fmt, args).items()
    ]
    columns = (*columns, number("against the weights before", "before", 5))
    show(Console(), f"linear layer, {title}", columns, points)


if __name__ == "__main__":
    main()
