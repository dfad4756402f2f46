"""The experts of one layer, and how one of them is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_moe.formats.float8 import FP8, FP8_PERCHANNEL
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix, check_matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.naming import NamingScheme
from hybrid_moe.loaders.planes import RawMatrix, planes_of
from hybrid_moe.loaders.quantization import NOTHING_SAID, Quantization
from hybrid_moe.loaders.quantize import encode, requantize, round_to_bf16, to_float32
from hybrid_moe.loaders.safetensors import ReadBuffer, SafetensorsIndex
from hybrid_moe.loaders.stored import Stored


@dataclass(frozen=True, slots=True)
class Stack:
    """The tensors of one projection: of one expert, or of all experts where they are fused.

    Attributes:
        weight, scale, bias: codes, scales and biases.
        zeros: zero points.
        factor: of the whole matrix.
        order: the group of each input.
    """

    weight: TensorInfo
    scale: TensorInfo | None = None
    bias: TensorInfo | None = None
    zeros: TensorInfo | None = None
    factor: TensorInfo | None = None
    order: TensorInfo | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Those that exist."""
        found = (self.weight, self.scale, self.bias, self.zeros, self.factor, self.order)
        return tuple(tensor for tensor in found if tensor is not None)


_QUANTIZED_FROM = (BF16, FP8, FP8_PERCHANNEL)
"""Formats that become others while they are loaded."""


class StoredPair(NamedTuple):
    """How a layer's projections are stored."""

    gate_up: Stored
    down: Stored


@dataclass(frozen=True)
class LayerSource:
    """The routed experts of one layer out of safetensors: an `ExpertSource`. Everything but the
    scales' values has been checked.

    Attributes:
        index: the checkpoint's tensors.
        layer: number of the layer, dense layers counted.
        prefix: what stands before `layers.` in the keys.
        scheme: the naming scheme.
        num_experts: routed experts E.
        hidden: hidden size H.
        intermediate: intermediate size I of one expert.
        stored: how the checkpoint stores the weights.
        transposed: fused tensors are [E, K, N], not [E, N, K].
        stacks: tensors of (gate, up, down) per expert, or of (gate_up, down) once where fused.
        unused: keys beside them that do not change what the weights mean, and are not read.
        ask_model: how the model's own module lays out gate and up; None where nobody knows.
        gate_up: the layout, where it is known already.
        quantization: what `config.json` says of it.
    """

    index: SafetensorsIndex
    layer: int
    prefix: str
    scheme: NamingScheme
    num_experts: int
    hidden: int
    intermediate: int
    stored: StoredPair
    transposed: bool
    stacks: tuple[tuple[Stack, ...], ...]
    unused: tuple[str, ...]
    ask_model: Callable[[], GateUp | None]
    gate_up: GateUp | None = None
    quantization: Quantization = NOTHING_SAID

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.index.path

    @property
    def formats(self) -> LayerFormats:
        """The formats in which experts are handed on unless others are asked for."""
        return LayerFormats(self.stored.gate_up.format, self.stored.down.format)

    @property
    def stored_types(self) -> str:
        """safetensors dtypes of the weights."""
        return "/".join(dict.fromkeys(stack.weight.dtype for stack in self.stacks[0]))

    def is_exact(self, formats: LayerFormats) -> bool:
        """Whether weights keep their values in `formats`."""
        return formats == self.formats and all(stored.exact for stored in self.stored)

    @property
    def state(self) -> str:
        """What tells its experts' values from those of another state of the files, or of another
        layout of gate and up."""
        return f"{self.index.state}, layer {self.layer} of {self.prefix!r}, {self.interleaved}"

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self.stacks[0][0].bias is not None

    @cached_property
    def interleaved(self) -> bool:
        """Whether rows of gate and up alternate in fused tensors; False where they are apart.

        Raises:
            CheckpointError: nothing tells.
        """
        if not self.scheme.fused:
            return False
        layout = self.gate_up or self.ask_model()
        if layout is not None:
            interleaved = layout == "interleaved"
            if interleaved and self.formats.gate_up.scale_rows > 1:
                raise CheckpointError(
                    f"{self.stacks[0][0].weight.where}: rows of gate and up alternate, and share "
                    f"the scales of {self.formats.gate_up.name}: such a tensor is not read"
                )
            return interleaved
        if self.has_bias and not self.scheme.interleaved:
            raise CheckpointError(
                f"{self.stacks[0][0].weight.where}: gate and up may be two halves or alternate "
                "(gpt-oss), and nothing here tells: there is no config.json of a model that "
                'Transformers knows. Say gate_up_layout="halves" or "interleaved"'
            )
        return self.scheme.interleaved

    def with_layout(self, layout: GateUp | None) -> LayerSource:
        """This layer with the layout of gate and up as the caller knows it; None changes nothing.

        Raises:
            ValueError: the model's own module has another one.
        """
        if layout is None or not self.scheme.fused:
            return self
        known = self.ask_model()
        if known not in (None, layout):
            raise ValueError(
                f'gate_up_layout is "{layout}", but the experts of the model that config.json of '
                f'{self.index.path} names have "{known}"'
            )
        return replace(self, gate_up=layout)

    def told_layout(self, layout: GateUp) -> LayerSource:
        """The same with the layout of the module that will compute the experts, which needs no
        other witness."""
        return replace(self, gate_up=layout)

    @property
    def expert_nbytes(self) -> int:
        """Bytes that are read for one expert."""
        return sum(t.nbytes for stack in self.stacks[0] for t in stack.tensors) // self._share

    @property
    def last_key(self) -> str:
        """Key of the last expert's first weight, for messages."""
        return self.stacks[-1][0].weight.where

    @property
    def _share(self) -> int:
        """Experts that share one tensor."""
        return self.num_experts if self.scheme.fused else 1

    def nbytes_as(self, formats: WeightFormat | LayerFormats) -> int:
        """Bytes of all the layer's experts in `formats`, packed, with float32 biases."""
        H, I = self.hidden, self.intermediate
        bias = bias_nbytes(H, I) if self.has_bias else 0
        return self.num_experts * (packed_nbytes(formats, H, I) + bias)

    def check_layout(self) -> None:
        """Raise `CheckpointError` where nothing tells how gate and up lie in fused tensors."""
        _ = self.interleaved

    def expect(self, expert: int) -> None:
        """Let the kernel read an expert ahead."""
        fused = self.scheme.fused
        for stack in self.stacks[0 if fused else expert]:
            for tensor in stack.tensors:
                self.index.expect(tensor.key, slice(expert, expert + 1) if fused else None)

    def expert(
        self,
        expert: int,
        formats: WeightFormat | LayerFormats | None = None,
        buffer: ReadBuffer | None = None,
    ) -> ExpertTensors:
        """Read one expert. Thread-safe.

        Args:
            expert: 0 to num_experts - 1, the checkpoint's own numbering.
            formats: to hand it on in, one for all projections or two; None is `formats` of the
                layer. 16-bit weights are quantized to others.
            buffer: memory to read into, which is reused: the arrays are then valid until the next
                call with it. None allocates.

        Returns:
            gate and up [I, H], down [H, I]. Rows may be strided, the last axis is contiguous.

        Raises:
            IndexError: no such expert.
            ValueError: weights stored so do not become these formats.
            CheckpointError: a file has been truncated, a scale is invalid, or a weight that has
                to be quantized is not finite.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"expert {expert} of layer {self.layer}: there are {self.num_experts} experts"
            )
        held = layer_formats(formats or self.formats)
        for stored, fmt in zip(self.stored, held, strict=True):
            if fmt is not stored.format and stored.format not in _QUANTIZED_FROM:
                raise ValueError(
                    f"layer {self.layer} of {self.path} stores its experts as {self.formats.name}, "
                    f"which does not become {held.name}"
                )
        if buffer is not None:
            tensors = [t for stack in self.stacks[0] for t in stack.tensors]
            buffer.reset([t.nbytes // self._share for t in tensors])
        stacks = self.stacks[0 if self.scheme.fused else expert]
        matrices = [
            self._read(stack, stored, expert, buffer)
            for stack, stored in zip(stacks, self._stored_of_stacks, strict=True)
        ]
        if self.scheme.fused:
            matrices = [*matrices[0].split(self.interleaved), matrices[1]]
        kinds = [(self.stored.gate_up, held.gate_up)] * 2 + [(self.stored.down, held.down)]
        gate, up, down = (
            self._encode(matrix, *kind) for matrix, kind in zip(matrices, kinds, strict=True)
        )
        check_matrix(gate, held.gate_up, self.intermediate, self.hidden)
        check_matrix(up, held.gate_up, self.intermediate, self.hidden)
        check_matrix(down, held.down, self.hidden, self.intermediate)
        return ExpertTensors(gate, up, down)

    @property
    def _stored_of_stacks(self) -> tuple[Stored, ...]:
        gate_up, down = self.stored
        return (gate_up,) * (len(self.stacks[0]) - 1) + (down,)

    def _read(self, stack: Stack, stored: Stored, expert: int, buffer: ReadBuffer | None) -> Matrix:
        """One projection; weights of 16 and 32 bits as they are stored."""

        def read(tensor: TensorInfo | None) -> Array | None:
            if tensor is None:
                return None
            out = None if buffer is None else buffer.take(tensor.nbytes // self._share)
            if not self.scheme.fused:
                return self.index.read(tensor.key, out=out)
            part: Array = self.index.read(tensor.key, slice(expert, expert + 1), out)[0]
            return part

        codes, where = read(stack.weight), self._where(stack.weight, expert)
        assert codes is not None
        codes = codes.reshape(codes.shape[0], -1)  # gpt-oss: [N, K/32, 16] -> [N, K/2]
        scales_where = where if stack.scale is None else self._where(stack.scale, expert)
        raw = RawMatrix(
            codes=codes.T if self.transposed else codes,
            scales=read(stack.scale),
            zeros=read(stack.zeros),
            factor=read(stack.factor),
            order=read(stack.order),
            scale_dtype="" if stack.scale is None else stack.scale.dtype,
            where=where,
            scales_where=scales_where,
        )
        bias = read(stack.bias)
        return Matrix(
            **planes_of(raw, stored, self.quantization.zeros_offset),
            bias=None if bias is None else to_float32(bias),
            where=where,
            scales_where=None if stack.scale is None else scales_where,
            scale_rows=stored.format.scale_rows,
        )

    def _where(self, tensor: TensorInfo, expert: int) -> str:
        return f"expert {expert} of {tensor.where}" if self.scheme.fused else tensor.where

    def _encode(self, matrix: Matrix, stored: Stored, fmt: WeightFormat) -> Matrix:
        if fmt is not stored.format:
            try:
                if stored.format is BF16:
                    codes, scales = encode(fmt, matrix.codes)
                else:
                    codes, scales = requantize(fmt, matrix, stored.format)
            except ValueError as error:
                raise CheckpointError(f"{matrix.where}: {error}") from error
            return replace(matrix, codes=codes, scales=scales, scale_rows=fmt.scale_rows)
        if not stored.exact:
            return replace(matrix, codes=round_to_bf16(matrix.codes))
        if self.transposed:
            return replace(matrix, codes=np.ascontiguousarray(matrix.codes))
        return matrix
