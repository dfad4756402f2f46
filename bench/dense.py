"""Speed of linear layers in the pool: gpt-oss-20b's, beside the ceilings and torch's `F.linear`.

    python bench/dense.py
    python bench/dense.py --formats BF16,MXFP4 --tokens 1,512

Layers are q·k·v (one job), o and the output layer, in as many copies as a model of a few layers
has, so that every call finds its weights in memory and in no cache. "In turn" is a pass over all of
them: what a token of decode reads of them. A prompt wants the output layer's product of its last
token only, so that layer is left out beyond 16 tokens. torch has the same weights in BF16. The job
without work has one strip of one group, and goes through the module that models have: what a call
costs beside its weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from harness import Reads, parse_list, parse_numbers, parser, time_beside_reads
from problem import Array, bf16_bits, time_calls
from rich.console import Console
from synthetic.models import MODELS
from tables import DENSE, OTHERS, show

from hybrid_moe.cpu_kernels.ceilings.peaks import mac_ceiling
from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.table import format_named
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

COPIES = 6
"""Of a layer's matrices: 0.3 GB of BF16, far beyond any cache beside the output layer."""

LONGEST_OUTPUT = 16
"""Tokens up to which the output layer is measured."""

_PART = 4096


def shapes() -> dict[str, list[tuple[int, int]]]:
    """Name -> (N, K) of the matrices of one job."""
    config = MODELS["gpt-oss-20b"].config
    H, head = config["hidden_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return {
        "q·k·v": [(queries, H), (keys, H), (keys, H)],
        "o": [(H, queries)],
        "lm_head": [(config["vocab_size"], H)],
    }


class Linear:
    """Random matrices of one input, in strips and as torch has them."""

    def __init__(self, method: str, sizes: Sequence[tuple[int, int]], pool: PoolConfig) -> None:
        fmt = format_named(method)
        rng = np.random.default_rng(4)
        self.matrices = [PackedMatrix(fmt, N, K, pool) for N, K in sizes]
        bits = [np.empty(size, np.uint16) for size in sizes]
        self.plain = [torch.from_numpy(array).view(torch.bfloat16) for array in bits]

        def fill(part: tuple[int, int, Array]) -> None:
            which, first, values = part
            self.matrices[which].load(Matrix(*fmt.encode(values)), first)
            bits[which][first : first + len(values)] = bf16_bits(values)

        for which, (N, K) in enumerate(sizes):
            part = rng.standard_normal((min(N, _PART), K), dtype=np.float32) / K**0.5
            parts = [(which, at, part[: min(_PART, N - at)]) for at in range(0, N, _PART)]
            self.matrices[which].allocate()
            with ThreadPoolExecutor(pool.threads) as workers:
                list(workers.map(fill, parts))
        self.layer = DenseLayer(self.matrices)
        self.inputs = sizes[0][1]
        self.nbytes = sum(m.nbytes for m in self.matrices)
        self.weights = sum(N * K for N, K in sizes)


def point(
    name: str,
    layers: Sequence[Linear],
    tokens: int,
    reads: Reads,
    peak: float,
    seconds: float,
    every: bool = False,
) -> dict[str, Any]:
    """A call's speed, ours and torch's in turn.

    Args:
        every: a call is all `layers` one after the other; else the next one of them.
    """
    rng = np.random.default_rng(5)
    bits = {
        K: bf16_bits(rng.standard_normal((tokens, K), dtype=np.float32))
        for K in {layer.inputs for layer in layers}
    }
    tensors = {K: torch.from_numpy(x).view(torch.bfloat16) for K, x in bits.items()}

    def ours(layer: Linear) -> None:
        layer.layer.forward(bits[layer.inputs])

    def theirs(layer: Linear) -> None:
        for weight in layer.plain:
            F.linear(tensors[layer.inputs], weight)

    def run(call: Callable[[Linear], None], index: int) -> None:
        for layer in layers if every else [layers[index % len(layers)]]:
            call(layer)

    timings = {
        who: time_beside_reads(lambda call=call: time_calls(lambda i: run(call, i), seconds), reads)
        for who, call in (("ours", ours), ("torch", theirs))
    }
    median, other = timings["ours"].median, timings["torch"].median
    share = 1 if every else len(layers)
    nbytes, weights = (
        sum(getattr(layer, what) for layer in layers) / share for what in ("nbytes", "weights")
    )
    return {
        "layer": name,
        "format": layers[0].layer.fmt.name,
        "tokens": tokens,
        "threads": layers[0].layer.pool.threads,
        "ms": 1e3 * median,
        "weight_bandwidth": nbytes / median / 1e9,
        "read_bandwidth": timings["ours"].reads[1],
        "rate": tokens * weights / median / 1e9,
        "rate_ceiling": peak / 1e9,
        "torch_ms": 1e3 * other,
        "ours_is_faster": other / median,
        "others": timings["ours"].calls.others,
    }


def empty_job(pool: PoolConfig, seconds: float = 0.5) -> dict[str, Any]:
    """Microseconds of a call of the module that has next to nothing to do."""
    (matrix,) = Linear("BF16", [(64, 32)], pool).matrices
    module = HybridLinear(matrix, "empty", torch.bfloat16)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    calls = time_calls(lambda _: module(x), seconds)
    return {"median_us": 1e6 * statistics.median(calls.seconds), "threads": pool.threads}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--formats", type=parse_list, default="BF16")
    made.add_argument("--tokens", type=parse_numbers, default="1,4,16,64,512")
    made.add_argument("--threads", type=int, default=usable_cores())
    made.add_argument("--seconds", type=float, default=0.5, help="of each point and library")
    args = made.parse_args()
    console = Console(width=160)
    torch.set_num_threads(args.threads)
    pool, reads = PoolConfig.choose(args.threads), Reads(args.threads)
    empty = empty_job(pool)
    console.print(f"a job without work: {empty['median_us']:.1f} us")
    points: list[dict[str, Any]] = []
    for method in args.formats:
        peak = mac_ceiling(method, pool)
        layers = {
            name: [Linear(method, sizes, pool) for _ in range(1 if name == "lm_head" else COPIES)]
            for name, sizes in shapes().items()
        }
        each = [layer for copies in layers.values() for layer in copies]
        points.append(point("in turn", each, 1, reads, peak, 2 * args.seconds, every=True))
        for name, copies in layers.items():
            wanted = [n for n in args.tokens if name != "lm_head" or n <= LONGEST_OUTPUT]
            points += [point(name, copies, n, reads, peak, args.seconds) for n in wanted]
        for layer in each:
            layer.layer.close()
        write_receipt(args.json, receipt("dense", points=points, empty=empty))
    show(console, f"linear layers of gpt-oss-20b on {processor()}", [*DENSE, OTHERS], points)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
