"""How far CPU layers are from float64: on the same dequantized weights, and on those before.

    python bench/accuracy.py
    python bench/accuracy.py --hidden 512 --intermediate 256      # seconds

The figure is ||y - reference|| / ||reference|| over all tokens, of an MoE layer in every format and
of one linear layer in those of `dense=`. Of the latter also against the weights before they were
rounded to the format: with random weights, what a quantized `dense` loses in a layer. Inputs are
standard normal ("normal") or the same with 8 channels 40 times as large ("outliers", as trained
models have them); weights are normal with variance 1 / K, of formats that are only read random
codes and scales; routing is uniform. Beside it stands the floor: the float64 result rounded once to
bf16, which no output in bf16 can beat. "Weights": ||W' - W|| / ||W|| of normal weights and what the
quantizer makes of them; of ggml's types ggml's own, where it is found. See docs/numerics.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import parse_list
from harness import parser as benchmark_parser
from peer.find import find_ggml
from peer.ggml import quantized_by_ggml
from problem import expert_output, relative_error
from rich.console import Console
from tables import ACCURACY, number, show, text
from weights import INT8_ACTIVATIONS, random_planes

from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.ggml import GGML
from hybrid_moe.formats.numbers import bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.quantize import encode
from hybrid_moe.planning.receipt import receipt, write_receipt

F64 = npt.NDArray[np.float64]
OUTLIERS, OUTLIER_SCALE = 8, 40.0


def is_made(fmt: WeightFormat) -> bool:
    """Whether there is a quantizer to the format."""
    return fmt.plane("minima") is None and fmt.plane("factors") is None and fmt not in GGML


def random_matrix(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Matrix:
    """N x K weights of variance 1 / K in `fmt`, or random ones of it."""
    if not is_made(fmt):
        return Matrix(**random_planes(fmt, rng, N, K).planes, scale_rows=fmt.scale_rows)
    weights = rng.standard_normal((N, K), np.float32) / np.float32(np.sqrt(K))
    codes, scales = encode(fmt, weights)
    return Matrix(codes, scales, scale_rows=fmt.scale_rows)


def quantizer_error(fmt: WeightFormat, K: int = 4096) -> float | None:
    """||W' - W|| / ||W|| of 256 rows of K normal weights; None where nothing here makes them."""
    weights = np.random.default_rng(7).standard_normal((256, K), np.float32)
    if is_made(fmt):
        codes, scales = fmt.encode(weights)
        made = fmt.dequantize(codes, scales)
    else:
        place = find_ggml(None)
        kept = quantized_by_ggml(place.variables["GGML_LIB"], fmt.name, weights) if place else None
        if kept is None:
            return None
        made = kept
    return relative_error(made.astype(np.float64), weights.astype(np.float64))


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


def measure(
    fmt: WeightFormat, args: argparse.Namespace, activation_bits: int = 16
) -> dict[str, tuple[float, float]]:
    """Name of the inputs -> (error of the kernels, error of the rounded float64 result)."""
    H, I, E, k, T = args.hidden, args.intermediate, args.experts, args.top_k, args.tokens
    rng = np.random.default_rng(args.seed)
    inputs = random_inputs(rng, T, H)
    ids = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :k].astype(np.int64)
    weights = rng.random((T, k), np.float32)
    weights /= weights.sum(axis=1, keepdims=True)

    layer = ExpertLayer(
        fmt, E, H, I, pool=PoolConfig(args.threads), isa=args.isa, activation_bits=activation_bits
    )
    layer.allocate(np.ones(E, np.bool_), biases=False)
    references: dict[str, F64] = {name: np.zeros((T, H)) for name in inputs}
    for e in range(E):
        expert = random_expert(fmt, (args.seed, e), H, I)
        layer.load(e, expert)
        tokens, slots = np.nonzero(ids == e)
        dense = [
            m.dequantize(fmt).astype(np.float64) for m in (expert.gate, expert.up, expert.down)
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
    parser = benchmark_parser(__doc__)
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
    parser.add_argument("--formats", type=parse_list, help="default: all that have kernels")
    args = parser.parse_args()
    console, layers = Console(), list(moe_points(args))
    title = f"relative l2 error against float64, tier {choose_tier(args.isa).name}"
    show(console, f"MoE layer, {title}", ACCURACY, layers)
    points = [
        {"method": fmt.name, "inputs": name, "error": error, "floor": floor, "before": before}
        for fmt in DENSE_FORMATS.values()
        if not args.formats or fmt.name in args.formats
        for name, (error, floor, before) in measure_linear(fmt, args).items()
    ]
    columns = (
        text("method", "{method}"),
        text("inputs", "{inputs}"),
        number("hybrid_moe", "error", 5),
        number("bf16 floor", "floor", 5),
        number("against the weights before", "before", 5),
    )
    show(console, f"linear layer, {title}", columns, points)
    sizes = {name: getattr(args, name) for name in ("hidden", "intermediate", "experts", "top_k")}
    tier = choose_tier(args.isa).name
    write_receipt(args.json, receipt("accuracy", points=layers, isa=tier, sizes=sizes))


def moe_points(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors of each format, with activations of 16 bits and of 8 where it has both."""
    for fmt in FORMATS.values():
        if not has_kernels(fmt) or (args.formats and fmt.name not in args.formats):
            continue
        weights = quantizer_error(fmt)
        for bits in (16, 8):
            try:
                errors = measure(fmt, args, bits)
            except (NotImplementedError, ValueError) as reason:
                if bits == 16:
                    raise
                logging.getLogger(__name__).debug("%s: %s", fmt.name, reason)
                continue
            yield {
                "method": fmt.name + (INT8_ACTIVATIONS if bits == 8 else ""),
                "normal": errors["normal"][0],
                "outliers": errors["outliers"][0],
                "floor": max(floor for _, floor in errors.values()),
                "weights": weights,
            }


if __name__ == "__main__":
    main()
