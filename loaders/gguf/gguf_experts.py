"""The experts of one layer of a GGUF model.

A layer has a tensor for each projection, [E, N, K] in rows of blocks, and gate and up may be one
tensor: all gate rows of an expert, then all up rows. Projections may be of different types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix, check_matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.loaders.gguf.blocks import fresh, planes_of_blocks
from hybrid_moe.loaders.gguf.ggml_types import READ, TYPES_BY_NAME
from hybrid_moe.loaders.gguf.gguf_header import BlockTensor
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.quantize import encode, round_to_bf16, to_float32
from hybrid_moe.loaders.safetensors import ReadBuffer

PROJECTIONS = ("gate", "up", "down")
GATE_UP = "gate_up"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Projection:
    """The tensors of one projection of all experts."""

    weight: BlockTensor
    bias: BlockTensor | None

    @property
    def format(self) -> WeightFormat:
        """In which it is handed on."""
        fmt = TYPES_BY_NAME[self.weight.dtype].format
        assert fmt is not None, self.weight.where
        return fmt


@dataclass(frozen=True)
class GgufLayer:
    """The routed experts of one layer: an `ExpertSource`.

    Attributes:
        index: the model's tensors.
        layer: number of the layer, dense layers counted.
        num_experts, hidden, intermediate: E, H and I.
        projections: by name: gate, up and down, or gate_up and down.
    """

    index: GgufIndex
    layer: int
    num_experts: int
    hidden: int
    intermediate: int
    projections: Mapping[str, Projection]

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.index.path

    @property
    def formats(self) -> LayerFormats:
        """Formats in which experts are handed on unless others are asked for: those stored."""
        return LayerFormats(self._first.format, self.projections["down"].format)

    @property
    def stored_types(self) -> str:
        """ggml's names of the types of the weights, for messages."""
        return "/".join(dict.fromkeys(p.weight.dtype for p in self.projections.values()))

    @property
    def state(self) -> str:
        """What tells its experts' values from those of another state of the files."""
        return f"{self.index.state}, layer {self.layer}"

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self._first.bias is not None

    @property
    def unused(self) -> tuple[str, ...]:
        """None: a tensor that is not read is refused."""
        return ()

    @property
    def expert_nbytes(self) -> int:
        """Bytes that are read for one expert."""
        return sum(tensor.nbytes for tensor in self._tensors) // self.num_experts

    @property
    def last_key(self) -> str:
        """Name and file of the first weight, for messages."""
        return self._first.weight.where

    @property
    def _first(self) -> Projection:
        return self.projections[GATE_UP if GATE_UP in self.projections else "gate"]

    @property
    def _tensors(self) -> list[BlockTensor]:
        return [t for p in self.projections.values() for t in (p.weight, p.bias) if t is not None]

    def is_exact(self, formats: LayerFormats) -> bool:
        """Whether weights keep their values in `formats`; else they are rounded on the way."""
        return formats == self.formats and not any(
            p.weight.dtype in ("F32", "F16") for p in self.projections.values()
        )

    def nbytes_as(self, formats: LayerFormats) -> int:
        """Bytes of all the layer's experts in `formats`, packed, with float32 biases."""
        bias = bias_nbytes(self.hidden, self.intermediate) if self.has_bias else 0
        return self.num_experts * (packed_nbytes(formats, self.hidden, self.intermediate) + bias)

    def check_layout(self) -> None:
        """Nothing is in doubt: GGUF has gate and up apart, or one behind the other."""

    def with_layout(self, layout: GateUp | None) -> GgufLayer:
        """This layer; in a GGUF file gate and up never alternate.

        Raises:
            ValueError: the caller says that they do, of a tensor that has both.
        """
        if layout == "interleaved" and GATE_UP in self.projections:
            raise ValueError(
                f'gate_up_layout is "{layout}", but {self.last_key} is a GGUF tensor, which has '
                '"halves"'
            )
        return self

    def told_layout(self, layout: GateUp) -> GgufLayer:
        """This layer: how the module that computes its experts takes them from one tensor says
        nothing of GGUF's."""
        return self

    def expect(self, expert: int) -> None:
        """Let the kernel read an expert ahead."""
        for tensor in self._tensors:
            self.index.expect(tensor.key, slice(expert, expert + 1))

    def expert(
        self, expert: int, formats: LayerFormats | None = None, buffer: ReadBuffer | None = None
    ) -> ExpertTensors:
        """Read one expert, see `ExpertSource.expert`. Blocks keep every bit; F16 and F32 are
        rounded to BF16, or quantized to other `formats` from what they are."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"expert {expert} of layer {self.layer}: there are {self.num_experts} experts"
            )
        wanted = formats or self.formats
        for stored, fmt in zip(self.formats, wanted, strict=True):
            if stored is not fmt and stored is not BF16:
                raise ValueError(
                    f"layer {self.layer} of {self.path} stores its experts as "
                    f"{self.formats.name}, which does not become {wanted.name}"
                )
        if buffer is not None:
            # as they are read, and again as planes
            sizes = [tensor.nbytes // self.num_experts for tensor in self._tensors]
            buffer.reset([*sizes, *self._plane_sizes()])
        gate_up, down = wanted
        I, H = self.intermediate, self.hidden
        if GATE_UP in self.projections:
            both = self._matrix(GATE_UP, expert, gate_up, buffer)
            gate, up = both.split(interleaved=False)
        else:
            gate, up = (self._matrix(name, expert, gate_up, buffer) for name in ("gate", "up"))
        tensors = ExpertTensors(gate, up, self._matrix("down", expert, down, buffer))
        for matrix, fmt, N, K in (
            (tensors.gate, gate_up, I, H),
            (tensors.up, gate_up, I, H),
            (tensors.down, down, H, I),
        ):
            check_matrix(matrix, fmt, N, K)
        return tensors

    def _plane_sizes(self) -> list[int]:
        """Bytes of the planes that blocks of one expert become."""
        sizes: list[int] = []
        for projection in self.projections.values():
            _, N, K = projection.weight.shape
            if projection.weight.dtype not in _FLOATS:
                shapes = ((p.shape(N, K), p.dtype.itemsize) for p in projection.format.planes)
                sizes += [math.prod(shape) * itemsize for shape, itemsize in shapes]
        return sizes

    def _matrix(
        self, name: str, expert: int, fmt: WeightFormat, buffer: ReadBuffer | None
    ) -> Matrix:
        projection = self.projections[name]
        where = f"expert {expert} of {projection.weight.where}"
        raw = self._read(projection.weight, expert, buffer)
        bias = None
        if projection.bias is not None:
            bias = to_float32(self._read(projection.bias, expert, buffer))
            if not np.isfinite(bias).all():
                raise CheckpointError(
                    f"expert {expert} of {projection.bias.where}: a bias is NaN or infinite"
                )
        if projection.weight.dtype not in _FLOATS:
            kind = TYPES_BY_NAME[projection.weight.dtype]
            take = fresh if buffer is None else buffer.take
            planes: dict[str, Any] = dict(planes_of_blocks(kind, raw, take))
            return Matrix(**planes, bias=bias, where=where)
        if fmt is BF16:
            return Matrix(codes=round_to_bf16(raw), bias=bias, where=where)
        try:
            codes, scales = encode(fmt, raw)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return Matrix(codes, scales, bias, where)

    def _read(self, tensor: BlockTensor, expert: int, buffer: ReadBuffer | None) -> Array:
        out = None if buffer is None else buffer.take(tensor.nbytes // self.num_experts)
        part: Array = self.index.read(tensor.key, slice(expert, expert + 1), out)[0]
        return part


def describe_gguf_layer(
    index: GgufIndex, layer: int, tensors: Mapping[str, BlockTensor]
) -> GgufLayer:
    """Find and check the tensors of a layer's experts.

    Args:
        tensors: by projection and ending ("up.weight"): all of the layer's experts.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the others, a type is not
            read, or there is a tensor that nothing explains.
    """
    fused = f"{GATE_UP}.weight" in tensors
    names = (GATE_UP, "down") if fused else PROJECTIONS
    known = {f"{name}.{ending}" for name in names for ending in ("weight", "bias")}
    for name, tensor in tensors.items():
        if name not in known:
            beside = f" beside {tensors[f'{GATE_UP}.weight'].where}" if fused else ""
            raise CheckpointError(
                f"{tensor.where}: what it means{beside} for a layer's experts is not known"
            )
    missing = next((name for name in names if f"{name}.weight" not in tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"blk.{layer}.ffn_{missing}_exps.weight: this tensor is missing from {index.path}"
        )
    projections = {
        name: Projection(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names
    }
    _check_types(projections)
    E, H, I = _sizes(projections)
    return GgufLayer(index, layer, E, H, I, projections)


def _check_types(projections: Mapping[str, Projection]) -> None:
    for projection in projections.values():
        weight, bias = projection.weight, projection.bias
        if TYPES_BY_NAME[weight.dtype].format is None:
            raise CheckpointError(
                f"{weight.where}: experts of ggml type {weight.dtype} are not read; those of "
                f"{', '.join(READ)} are"
            )
        if bias is not None and bias.dtype not in _FLOATS:
            raise CheckpointError(f"{bias.where}: biases of type {bias.dtype} are not read")
    first, *others = projections.values()
    for other in others:
        if (other.bias is None) != (first.bias is None):
            with_bias, without = (first, other) if other.bias is None else (other, first)
            assert with_bias.bias is not None
            raise CheckpointError(
                f"{with_bias.bias.where}: there is none beside {without.weight.where}"
            )
    if GATE_UP not in projections:
        gate, up = projections["gate"], projections["up"]
        if gate.format is not up.format:
            raise CheckpointError(
                f"{gate.weight.where} is {gate.weight.dtype} and {up.weight.stored_name} is "
                f"{up.weight.dtype}: gate and up are read together, so they must be of one type"
            )


def _sizes(projections: Mapping[str, Projection]) -> tuple[int, int, int]:
    """E, H and I, by the down projection, with all shapes checked."""
    down = projections["down"].weight
    if len(down.shape) != 3:
        raise CheckpointError(f"{down.where}: shape {down.shape}, expected [experts, rows, inputs]")
    E, H, I = down.shape
    rows = {"gate": (I, H), "up": (I, H), GATE_UP: (2 * I, H), "down": (H, I)}
    for name, projection in projections.items():
        N, K = rows[name]
        expected: list[tuple[BlockTensor, tuple[int, ...]]] = [(projection.weight, (E, N, K))]
        if projection.bias is not None:
            expected.append((projection.bias, (E, N)))
        for tensor, shape in expected:
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.where}: shape {tensor.shape}, expected {shape} beside {down.shape} "
                    f"of {down.stored_name}"
                )
        multiple = projection.format.k_multiple
        if K % multiple:
            raise CheckpointError(
                f"{projection.weight.where}: {projection.weight.dtype} rows of {K} weights; the "
                f"length must be a multiple of {multiple}"
            )
    return E, H, I
