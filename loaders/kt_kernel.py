"""Experts that kt-kernel has quantized: safetensors with a tensor for each NUMA node.

    blk.L.ffn_{gate,up,down}_exps.E.numa.N.weight   int8 [bytes]
    blk.L.ffn_{gate,up,down}_exps.E.numa.N.scale    float32 [rows of the part]

Node N of n has the rows N I/n .. (N + 1) I/n of gate and up, and as many columns of down, of which
it has scales of its own. Codes lie as AMX tiles take them, see `bit_order.untile`: blocks of 128
rows (8 bits: 64) and 3584 inputs. 4-bit codes are multiplied by 16 in the tiles, and their scales
are a sixteenth of what they are here.

Source: `BufferBInt4Impl` and `GemmKernel224Int8::BufferB` of kt-kernel, which writes these matrices
as they are in its memory. Its MOE_INT4 and MOE_INT8 have the same names for what AOCL and KML
reorder in ways of their own: the files do not tell, and those are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from hybrid_moe.formats.integers import INT4_ROW, INT4_SLICE, INT8_ROW, INT8_SLICE
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix, check_matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.loaders.naming import LayerKeys, NamingScheme
from hybrid_moe.loaders.safetensors import ReadBuffer, SafetensorsIndex

KT_KERNEL = NamingScheme("kt-kernel", "ffn_exps", "gate", "up", "down")
"""For what names are asked for; the keys are of another kind."""
PROJECTIONS = ("gate", "up", "down")
REORDERED = ("MOE_INT4", "MOE_INT8")
"""Methods whose own files are not read."""

_KEY = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|up|down)_exps\.(\d{1,6})\.numa\.(\d{1,4})\.(\w+)")
_TILE_ROWS = 32
_TILE_BYTES = 64
_BLOCK_ROWS = {4: 128, 8: 64}
_BLOCK_INPUTS = 3584

Part = tuple[TensorInfo, TensorInfo]
"""Codes and scales of one projection on one node."""


def kt_layers(keys: Iterable[str]) -> dict[int, LayerKeys]:
    """The layers of a checkpoint under these names, by number, ascending."""
    found: dict[int, LayerKeys] = {}
    for key in keys:
        if "_exps." in key and (match := _KEY.fullmatch(key)):
            layer = int(match[1])
            entry = found.setdefault(layer, LayerKeys(layer, "blk.", KT_KERNEL))
            entry.keys.append(key)
            entry.experts.add(int(match[3]))
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class KtSource:
    """The routed experts of one layer: an `ExpertSource`.

    Attributes:
        index: the checkpoint's tensors.
        layer: number of the layer.
        num_experts, hidden, intermediate: E, H and I.
        bits: of a code, 4 or 8.
        parts: of each expert, by projection, those of the nodes.
    """

    index: SafetensorsIndex
    layer: int
    num_experts: int
    hidden: int
    intermediate: int
    bits: int
    parts: tuple[Mapping[str, tuple[Part, ...]], ...] = field(repr=False)
    has_bias: bool = False
    unused: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.index.path

    @property
    def nodes(self) -> int:
        """NUMA nodes that it was made for."""
        return len(self.parts[0]["gate"])

    @cached_property
    def formats(self) -> LayerFormats:
        """Scales are for rows; down has those of each node's columns."""
        row = INT4_ROW if self.bits == 4 else INT8_ROW
        part = INT4_SLICE if self.bits == 4 else INT8_SLICE
        return LayerFormats(row, row if self.nodes == 1 else part)

    @property
    def stored_types(self) -> str:
        """For messages."""
        return f"kt-kernel's INT{self.bits}"

    @property
    def expert_nbytes(self) -> int:
        """Bytes that are read for one expert."""
        parts = (part for parts in self.parts[0].values() for part in parts)
        return sum(tensor.nbytes for part in parts for tensor in part)

    @property
    def state(self) -> str:
        """What tells its experts' values from those of another state of the files."""
        return f"{self.index.state}, layer {self.layer}"

    @property
    def last_key(self) -> str:
        """Of the last expert's first weight, for messages."""
        return self.parts[-1]["gate"][0][0].where

    def is_exact(self, formats: LayerFormats) -> bool:
        """Whether weights keep their values in `formats`."""
        return formats == self.formats

    def nbytes_as(self, formats: WeightFormat | LayerFormats) -> int:
        """Bytes of all the layer's experts in `formats`, packed."""
        return self.num_experts * packed_nbytes(formats, self.hidden, self.intermediate)

    def check_layout(self) -> None:
        """Gate and up are tensors of their own."""

    def with_layout(self, layout: GateUp | None) -> KtSource:
        """Itself: gate and up are tensors of their own."""
        return self

    def told_layout(self, layout: GateUp) -> KtSource:
        """Itself, likewise."""
        return self

    def expect(self, expert: int) -> None:
        """Let the kernel read an expert ahead."""
        for parts in self.parts[expert].values():
            for tensor in (t for part in parts for t in part):
                self.index.expect(tensor.key)

    def expert(
        self,
        expert: int,
        formats: WeightFormat | LayerFormats | None = None,
        buffer: ReadBuffer | None = None,
    ) -> ExpertTensors:
        """Read one expert, see `ExpertSource.expert`."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"expert {expert} of layer {self.layer}: there are {self.num_experts} experts"
            )
        held = layer_formats(formats or self.formats)
        if held != self.formats:
            raise ValueError(
                f"layer {self.layer} of {self.path} stores its experts as {self.formats.name}, "
                f"which does not become {held.name}"
            )
        parts = self.parts[expert]
        if buffer is not None:
            buffer.reset([t.nbytes for some in parts.values() for part in some for t in part])
        gate, up = (self._rows(parts[name], buffer) for name in ("gate", "up"))
        down = self._columns(parts["down"], buffer)
        check_matrix(gate, held.gate_up, self.intermediate, self.hidden)
        check_matrix(up, held.gate_up, self.intermediate, self.hidden)
        check_matrix(down, held.down, self.hidden, self.intermediate)
        return ExpertTensors(gate, up, down)

    def _rows(self, parts: tuple[Part, ...], buffer: ReadBuffer | None) -> Matrix:
        """Parts below each other."""
        read = [self._part(p, self.intermediate // self.nodes, self.hidden, buffer) for p in parts]
        codes, scales = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        return self._matrix(parts, codes, scales)

    def _columns(self, parts: tuple[Part, ...], buffer: ReadBuffer | None) -> Matrix:
        """Parts side by side; each group of a row has the scale of its part."""
        inputs = self.intermediate // self.nodes
        read = [self._part(part, self.hidden, inputs, buffer) for part in parts]
        codes, scales = (np.concatenate(a, axis=1) for a in zip(*read, strict=True))
        if self.nodes > 1:
            scales = np.repeat(scales, inputs // self.formats.down.group, axis=1)
        return self._matrix(parts, codes, scales)

    def _matrix(self, parts: tuple[Part, ...], codes: Array, scales: Array) -> Matrix:
        codes = codes.view(self.formats.gate_up.code_dtype)
        return Matrix(codes, scales, where=parts[0][0].where, scales_where=parts[0][1].where)

    def _part(
        self, part: Part, rows: int, inputs: int, buffer: ReadBuffer | None
    ) -> tuple[Array, Array]:
        from hybrid_moe.loaders.bit_order import untile

        raw, scales = (
            self.index.read(t.key, out=None if buffer is None else buffer.take(t.nbytes))
            for t in part
        )
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{part[1].where}: a scale is {scales[~np.isfinite(scales)][0]}, which is no "
                "finite number; the checkpoint is damaged"
            )
        words = raw.view(np.uint32)
        codes = untile(words, rows, inputs, self.bits, _BLOCK_ROWS[self.bits], _BLOCK_INPUTS)
        return codes, (scales * np.float32(16 if self.bits == 4 else 1)).reshape(rows, 1)


def describe_kt_layer(index: SafetensorsIndex, keys: LayerKeys) -> KtSource:
    """Find and check all tensors of a layer's experts.

    Raises:
        CheckpointError: an expert, a node or a tensor is missing, or a size or dtype is wrong.
    """
    experts = max(keys.experts) + 1
    if len(keys.experts) != experts:
        missing = next(expert for expert in range(experts) if expert not in keys.experts)
        raise CheckpointError(
            f"expert {missing} of layer {keys.layer} has no tensors in {index.path}, "
            f"but expert {experts - 1} has"
        )
    nodes = 1 + max(int(key.split(".")[5]) for key in keys.keys)
    parts = tuple(
        {
            projection: tuple(
                _find(index, keys.layer, projection, expert, node) for node in range(nodes)
            )
            for projection in PROJECTIONS
        }
        for expert in range(experts)
    )
    known = {t.key for some in parts for p in some.values() for part in p for t in part}
    for key in keys.keys:
        if key not in known:
            raise CheckpointError(
                f"{index.tensors[key].where}: an expert's tensor that kt-kernel's experts do not "
                "have: what it means for them is not known"
            )
    (gate, gate_scale), (_, down_scale) = parts[0]["gate"][0], parts[0]["down"][0]
    rows, hidden = _length(gate_scale, "F32"), _length(down_scale, "F32")
    bits = 8 * gate.nbytes // max(1, rows * hidden)
    if bits not in (4, 8):
        raise CheckpointError(
            f"{gate.where}: {gate.nbytes} bytes are no {rows} x {hidden} codes of 4 or 8 bits"
        )
    source = KtSource(index, keys.layer, experts, hidden, rows * nodes, bits, parts)
    _check_tiles(source, rows)
    for some in parts:
        for projection, (N, K) in (
            ("gate", (rows, hidden)), ("up", (rows, hidden)), ("down", (hidden, rows)),
        ):  # fmt: skip
            for codes, scales in some[projection]:
                _check(codes, ("I8", "U8"), N * K * bits // 8)
                _check(scales, ("F32",), N)
    return source


def _find(index: SafetensorsIndex, layer: int, projection: str, expert: int, node: int) -> Part:
    stem = f"blk.{layer}.ffn_{projection}_exps.{expert}.numa.{node}"
    codes, scales = (index.tensors.get(f"{stem}.{name}") for name in ("weight", "scale"))
    if codes is None or scales is None:
        name = "weight" if codes is None else "scale"
        raise CheckpointError(
            f"{stem}.{name}: this tensor of expert {expert} of layer {layer} is missing from "
            f"{index.path}"
        )
    return codes, scales


def _length(tensor: TensorInfo, dtype: str) -> int:
    _check(tensor, (dtype,), None)
    return tensor.shape[0]


def _check(tensor: TensorInfo, dtypes: tuple[str, ...], length: int | None) -> None:
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.where}: dtype {tensor.dtype}, expected {' or '.join(dtypes)}"
        )
    if len(tensor.shape) != 1 or (length is not None and tensor.shape[0] != length):
        expected = "one axis" if length is None else f"({length},)"
        raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {expected}")


def _check_tiles(source: KtSource, part: int) -> None:
    """Raise unless the matrices of each node are whole tiles; of several nodes, whole groups."""
    where = source.parts[0]["gate"][0][0].where
    inputs = 8 * _TILE_BYTES // source.bits
    for name, size in (("hidden size", source.hidden), ("part of a node", part)):
        if not size or size % _TILE_ROWS or size % inputs:
            raise CheckpointError(
                f"{where}: a {name} of {size}, which must be a multiple of {inputs}"
            )
    if source.nodes > 1 and part % source.formats.down.group:
        raise CheckpointError(
            f"{where}: a node's part of {part} is no multiple of {source.formats.down.group}: such "
            f"8-bit experts are read only where they were made for one node, not {source.nodes}"
        )
