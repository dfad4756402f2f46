"""Slots with random experts, packed by the CPU's packer and cut over pools as a layer would."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows
from hybrid_moe.formats.shares import ShareLayout, even_shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from tests.cpu_kernels.cases import random_matrix as dense_matrix
from tests.cpu_kernels.toolbox import aligned
from tests.formats import random_matrix


@dataclass(frozen=True)
class Slots:
    """Experts in slots.

    Attributes:
        layout: of a slot.
        memory: uint8 [S, nbytes].
        experts: what the slots hold, for references.
    """

    layout: SlotLayout
    memory: npt.NDArray[np.uint8]
    experts: Sequence[ExpertTensors]


def slot_layout(
    fmt: WeightFormat | LayerFormats,
    H: int,
    I: int,
    *,
    parts: tuple[int, ...] = (1,),
    biases: bool = False,
) -> SlotLayout:
    """Of experts that pools of these numbers of threads share."""
    formats = layer_formats(fmt)
    blocks = even_shares(I // GROUP, parts)
    strips = even_shares(-(-H // STRIP_ROWS), parts)
    gate_up, down = strip_layout(formats.gate_up, H), strip_layout(formats.down, I)
    return SlotLayout(
        formats,
        H,
        I,
        tuple(
            ShareLayout(
                range(*blocks[pool : pool + 2].tolist()),
                range(*strips[pool : pool + 2].tolist()),
                gate_up,
                down,
                biases,
            )
            for pool in range(len(parts))
        ),
    )


def pack_slot(layout: SlotLayout, slot: npt.NDArray[np.uint8], expert: ExpertTensors) -> None:
    """Pack one expert, uint8 [nbytes]."""
    for at, share in zip(layout.share_offsets, layout.shares, strict=True):
        piece = slot[at : at + share.nbytes]
        piece[:] = 0
        address = piece.ctypes.data
        pack_gate_up(
            address, share.blocks, share.gate_up, expert.gate, expert.up, layout.intermediate
        )
        pack_rows(address + share.down_offset, share.strips, share.down, expert.down, layout.hidden)
        for name, rows in share.bias_rows.items() if layout.biases else ():
            bias = getattr(expert, name).bias
            if bias is not None:
                part = bias[rows.start : rows.stop]
                share.bias(piece, name)[: len(part)] = part


def random_expert(
    fmt: WeightFormat | LayerFormats, rng: np.random.Generator, H: int, I: int, bias: bool
) -> ExpertTensors:
    """Of one format or two."""

    def matrix(fmt: WeightFormat, N: int, K: int) -> Matrix:
        if fmt.name in DENSE_FORMATS:
            return dense_matrix(fmt, rng, N, K, bias)
        b = rng.standard_normal(N).astype(np.float32) if bias else None
        return dataclasses.replace(random_matrix(fmt, rng, N, K), bias=b)

    first, second = layer_formats(fmt)
    return ExpertTensors(matrix(first, I, H), matrix(first, I, H), matrix(second, H, I))


def random_slots(
    fmt: WeightFormat | LayerFormats,
    H: int,
    I: int,
    slots: int,
    *,
    parts: tuple[int, ...] = (1,),
    bias: bool = False,
    seed: int = 0,
) -> Slots:
    """Random experts in their slots."""
    rng = np.random.default_rng(seed)
    layout = slot_layout(fmt, H, I, parts=parts, biases=bias)
    experts = [random_expert(fmt, rng, H, I, bias) for _ in range(slots)]
    memory = aligned((slots, layout.nbytes), np.uint8, fill=0xFF)
    for slot, expert in zip(memory, experts, strict=True):
        pack_slot(layout, slot, expert)
    return Slots(layout, memory, experts)
