"""A pool's share of the weights; of an expert, one range of memory with all that a pass reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, StripLayout


def even_shares(units: int, parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """First unit of each part and the end, in proportion to `parts`."""
    bounds = np.concatenate([[0], np.cumsum(parts)]) * units / sum(parts)
    return np.round(bounds).astype(np.int64)


@dataclass(frozen=True)
class ShareLayout:
    """Where the parts of a share lie:

        gate/up strips | down strips | gate bias | up bias | down bias

    Biases are float32, one for each row of the strips, zero past the matrix's last row. Every part
    is whole cache lines: strips are, and biases are 4 * 32 bytes for each gate/up strip and 4 * 64
    for each down strip.

    Attributes:
        blocks: the expert's gate/up strips that the pool has.
        strips: the down strips that it has.
        gate_up, down: layouts of one strip of these.
        biases: there is room for biases.
    """

    blocks: range
    strips: range
    gate_up: StripLayout
    down: StripLayout
    biases: bool = False

    @property
    def down_offset(self) -> int:
        """Bytes in front of the down strips."""
        return len(self.blocks) * self.gate_up.nbytes

    @property
    def strip_bytes(self) -> int:
        """Bytes of all strips, in front of the biases."""
        return self.down_offset + len(self.strips) * self.down.nbytes

    @cached_property
    def bias_rows(self) -> dict[str, range]:
        """Rows of gate, up and down that the pool has, padding included."""
        block_rows = range(GROUP * self.blocks.start, GROUP * self.blocks.stop)
        strip_rows = range(STRIP_ROWS * self.strips.start, STRIP_ROWS * self.strips.stop)
        return {"gate": block_rows, "up": block_rows, "down": strip_rows}

    @cached_property
    def bias_offsets(self) -> dict[str, int]:
        """Bytes in front of the biases of gate, up and down."""
        offsets, at = {}, self.strip_bytes
        for name, rows in self.bias_rows.items():
            offsets[name] = at
            at += 4 * len(rows)
        return offsets

    @property
    def nbytes(self) -> int:
        """Bytes of the whole range."""
        rows = sum(map(len, self.bias_rows.values())) if self.biases else 0
        return self.strip_bytes + 4 * rows

    def bias(self, share: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.float32]:
        """The biases of `name` in a range with room for them, uint8 [nbytes]: a view, float32
        [len(bias_rows[name])]."""
        at = self.bias_offsets[name]
        return share[at : at + 4 * len(self.bias_rows[name])].view(np.float32)
