"""A slot: one expert in GPU memory, in the bytes that the CPU holds it in.

On the CPU an expert is one range of memory for each pool (`formats.shares`). A slot is these ranges
one after another, so promotion and demotion copy whole ranges and change no byte. Kernels find the
parts through two small tables, since where a strip lies depends on how the pools share it:

    slot = [pool 0: gate/up strips | down strips | gate, up, down biases] [pool 1: ...] ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.strips import GROUP, LINE, STRIP_ROWS, StripLayout, round_up
from hybrid_moe.formats.weight_format import LayerFormats

Table = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SlotLayout:
    """Where the parts of an expert lie in a slot.

    Attributes:
        formats: of the gate/up strips and of the down strips.
        hidden, intermediate: H and I.
        shares: the pools' ranges, in the order of pools.
    """

    formats: LayerFormats
    hidden: int
    intermediate: int
    shares: tuple[ShareLayout, ...]

    def __post_init__(self) -> None:
        blocks = [share.blocks for share in self.shares]
        strips = [share.strips for share in self.shares]
        for name, parts, units in (
            ("gate/up", blocks, self.intermediate // GROUP),
            ("down", strips, round_up(self.hidden, STRIP_ROWS) // STRIP_ROWS),
        ):
            bounds = [part.start for part in parts] + [units]
            ends = [0] + [part.stop for part in parts]
            if bounds != ends:
                raise ValueError(f"the pools' {name} strips are {parts}, must be 0..{units - 1}")

    @property
    def biases(self) -> bool:
        """Whether there is room for biases."""
        return self.shares[0].biases

    @property
    def gate_up(self) -> StripLayout:
        """Of one gate/up strip."""
        return self.shares[0].gate_up

    @property
    def down(self) -> StripLayout:
        """Of one down strip."""
        return self.shares[0].down

    @cached_property
    def share_offsets(self) -> tuple[int, ...]:
        """Bytes in front of each pool's range."""
        sizes = [share.nbytes for share in self.shares]
        return tuple(int(at) for at in np.concatenate([[0], np.cumsum(sizes)])[:-1])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a slot, and from one slot to the next: a multiple of 64."""
        return sum(share.nbytes for share in self.shares)

    @cached_property
    def gate_up_table(self) -> Table:
        """int32 [I / 32, 3]: of each gate/up strip, in units of 64 bytes from the slot's start, the
        strip, its 32 gate biases and its 32 up biases (0 where there are none)."""
        rows = []
        for at, share in zip(self.share_offsets, self.shares, strict=True):
            biases = [at + share.bias_offsets[name] for name in ("gate", "up")]
            for block in range(len(share.blocks)):
                strip = at + block * share.gate_up.nbytes
                rows.append([strip, *(self._bias(bias, block, GROUP) for bias in biases)])
        return _lines(rows, 3)

    @cached_property
    def down_table(self) -> Table:
        """int32 [ceil(H / 64), 2]: of each down strip the strip and its 64 biases, likewise."""
        rows = []
        for at, share in zip(self.share_offsets, self.shares, strict=True):
            bias = at + share.bias_offsets["down"]
            for strip in range(len(share.strips)):
                place = at + share.down_offset + strip * share.down.nbytes
                rows.append([place, self._bias(bias, strip, STRIP_ROWS)])
        return _lines(rows, 2)

    def _bias(self, first: int, strip: int, rows: int) -> int:
        """Where a strip's biases begin, of `rows` for each strip."""
        return first + 4 * rows * strip if self.biases else 0


def _lines(rows: Sequence[Sequence[int]], columns: int) -> Table:
    """Byte offsets as numbers of cache lines; every part begins one."""
    offsets = np.array(rows, np.int64).reshape(-1, columns)
    if (offsets % LINE).any():
        raise AssertionError("a part of a slot does not begin a cache line")
    return (offsets // LINE).astype(np.int32)
