"""Empty packed modules in place of a model's linear layers, and what fills them.

A layer's values come from a `Weight`, a range of rows at a time: of a checkpoint's file or of a
torch parameter. Whole weights are in memory only for a gated MLP, which is packed in one piece.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.numbers import F32, Array
from hybrid_moe.formats.strips import STRIP_ROWS, packed_nbytes, round_up
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.choose import Choice
from hybrid_moe.integrations.transformers.dense.embedding import HybridEmbedding
from hybrid_moe.integrations.transformers.dense.grouped import HybridGroupedLinear
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import HybridMLP
from hybrid_moe.integrations.transformers.packing_bar import PackingBar
from hybrid_moe.loaders.quantize import encode, round_to_bf16
from hybrid_moe.parallel import for_each

PART_BYTES = 2 << 20
"""Of a weight that a thread reads and packs at a time, as it is stored."""


@dataclass(frozen=True)
class Weight:
    """The values of a linear layer.

    Attributes:
        rows, inputs: N, K.
        read: rows `start` to `stop` as a raw BF16 (uint16), F16 or F32 array, for the calling
            thread until it reads again.
        bias: float32 [N]; None where there is none.
        where: tensor key and file, or the module, for messages.
    """

    rows: int
    inputs: int
    read: Callable[[int, int], Array]
    bias: F32 | None
    where: str


Weights = Callable[[str], Weight]
"""The weight of the linear layer of this name."""


@dataclass(frozen=True)
class Part:
    """Rows of a weight that become rows of a matrix.

    Attributes:
        matrix: what is filled.
        layer: name of the linear layer whose weight is read.
        first: the weight's row that is the matrix's row 0.
        start, stop: rows of the matrix.
    """

    matrix: PackedMatrix
    layer: str
    first: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Packed."""
        return -(-(self.stop - self.start) // STRIP_ROWS) * self.matrix.layout.nbytes

    def load(self, weight: Weight) -> None:
        """Read and pack them."""
        raw = weight.read(self.first + self.start, self.first + self.stop)
        codes, scales = _in_format(raw, self.matrix.fmt)
        bias = weight.bias
        if bias is not None:
            bias = bias[self.first + self.start : self.first + self.stop]
        self.matrix.load(Matrix(codes, scales, bias, weight.where), self.start)


def parts_of(matrix: PackedMatrix, layer: str, first: int = 0) -> list[Part]:
    """All of a matrix's rows, `PART_BYTES` at a time."""
    step = max(STRIP_ROWS, PART_BYTES // (2 * matrix.inputs) // STRIP_ROWS * STRIP_ROWS)
    starts = range(0, matrix.rows, step)
    return [Part(matrix, layer, first, s, min(s + step, matrix.rows)) for s in starts]


def build(
    model: nn.Module, choice: Choice, fmt: WeightFormat, pool: PoolConfig
) -> dict[str, nn.Module]:
    """The packed modules for what was chosen in `model`, by the names of those that they replace.
    They have memory and no values yet; matrices of one decoder layer share it, so that not each of
    them is rounded up to huge pages."""
    matrices: dict[str, PackedMatrix] = {}
    blocks: dict[str, list[PackedMatrix]] = {}
    for name, linear in choice.linears.items():
        matrices[name] = PackedMatrix(
            fmt, linear.out_features, linear.in_features, pool, bias=linear.bias is not None
        )
    for name, (linear, groups) in choice.grouped.items():
        rows = linear.out_features // groups
        blocks[name] = [PackedMatrix(fmt, rows, linear.in_features, pool) for _ in range(groups)]
    _allocate({**{n: [m] for n, m in matrices.items()}, **blocks}, pool)
    built: dict[str, nn.Module] = {}
    for name, linear in choice.linears.items():
        built[name] = HybridLinear(matrices[name], name, linear.weight.dtype)
    for name, embedding in choice.tied.items():
        head, old = built[name], model.get_submodule(embedding)
        assert isinstance(head, HybridLinear) and isinstance(old, nn.Embedding)
        built[embedding] = HybridEmbedding(head, embedding, old.padding_idx)
    for name, (linear, _) in choice.grouped.items():
        built[name] = HybridGroupedLinear(
            HybridLinear(matrix, f"{name}, block {g}", linear.weight.dtype)
            for g, matrix in enumerate(blocks[name])
        )
    for name, mlp in choice.mlps.items():
        dtype = mlp.linears[mlp.names[0]].weight.dtype
        built[name] = HybridMLP(mlp, fmt, pool, f"{name} ({mlp.kind})", dtype)
    for module in built.values():
        for inner in module.modules():
            inner._is_hf_initialized = True  # type: ignore[assignment]  # nothing is to be drawn
    return built


def load(name: str, module: nn.Module, weights: Weights, threads: int, bar: PackingBar) -> None:
    """Fill a module of `build`."""
    if isinstance(module, HybridMLP):
        tensors = [
            _whole(weights(f"{name}.{child}"), module.layer.fmt, threads) for child in module.names
        ]
        module.load(ExpertTensors(*tensors))
        bar.add(nbytes_of(module))
        return

    def work(part: Part) -> None:
        part.load(weights(part.layer))
        bar.add(part.nbytes)

    for_each(_parts(name, module), work, threads)


def load_all(
    built: Mapping[str, nn.Module], weights: Weights, threads: int, bar: PackingBar
) -> None:
    """Fill all modules of `build`. MLPs come first: what one of them needs beside its strips is
    free again, and smaller than what is packed after it."""
    for name, module in built.items():
        if isinstance(module, HybridMLP):
            load(name, module, weights, threads, bar)

    def work(part: Part) -> None:
        part.load(weights(part.layer))
        bar.add(part.nbytes)

    parts = (part for name, module in built.items() for part in _parts(name, module))
    for_each(parts, work, threads)


def nbytes_of(module: nn.Module) -> int:
    """Packed bytes of a module of `build`; those of a tied embedding are its output layer's."""
    if isinstance(module, HybridMLP):
        return packed_nbytes(module.layer.fmt, module.spec.hidden, module.spec.intermediate)
    return sum(m.matrix.nbytes for m in module.modules() if isinstance(m, HybridLinear))


def _parts(name: str, module: nn.Module) -> Iterator[Part]:
    if isinstance(module, HybridLinear):
        yield from parts_of(module.matrix, name)
    elif isinstance(module, HybridGroupedLinear):
        for g, block in enumerate(module.blocks):
            assert isinstance(block, HybridLinear)
            yield from parts_of(block.matrix, name, g * block.matrix.rows)


def _whole(weight: Weight, fmt: WeightFormat, threads: int) -> Matrix:
    """All of a weight in `fmt`, read by several threads."""
    codes = np.empty(fmt.code_shape(weight.rows, weight.inputs), fmt.code_dtype)
    shape = fmt.scale_shape(weight.rows, weight.inputs)
    scales = None if fmt.scale is None or shape is None else np.empty(shape, fmt.scale.dtype)
    step = max(1, PART_BYTES // (2 * weight.inputs))

    def read(start: int) -> None:
        stop = min(start + step, weight.rows)
        part, part_scales = _in_format(weight.read(start, stop), fmt)
        codes[start:stop] = part
        if scales is not None:
            scales[start:stop] = part_scales

    for_each(range(0, weight.rows, step), read, threads)
    return Matrix(codes, scales, weight.bias, weight.where)


def _in_format(raw: Array, fmt: WeightFormat) -> tuple[Array, Array | None]:
    return (round_to_bf16(raw), None) if fmt is BF16 else encode(fmt, raw)


def _allocate(matrices: Mapping[str, list[PackedMatrix]], pool: PoolConfig) -> None:
    """Memory for matrices by the names of their layers, a decoder layer's together."""
    together: dict[str, list[PackedMatrix]] = defaultdict(list)
    for name, these in matrices.items():
        match = re.match(r".*?\.\d+\.", name)
        together[match[0] if match else name] += these
    for these in together.values():
        workspaces = [
            Workspace(sum(round_up(m.share_nbytes(p), 64) for m in these), nodes)
            for p, nodes in enumerate(pool.memory_nodes)
        ]
        for matrix in these:
            matrix.allocate(workspaces)


def torch_weight(linear: nn.Linear, where: str) -> Weight:
    """The values of a layer that torch holds; BF16 is read where it is."""
    values = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach().float().numpy()

    def read(start: int, stop: int) -> Array:
        rows = values[start:stop]
        if rows.dtype == torch.bfloat16:
            return rows.view(torch.int16).numpy().view(np.uint16)
        return rows.numpy()

    return Weight(linear.out_features, linear.in_features, read, bias, where)
