"""Layout of packed weights: strips of four panels, read as one stream.

A panel is 16 output rows, a strip four panels: for a down projection rows 64s..64s+63; for gate
and up, 32 rows of gate and the same 32 rows of up, so that one pass yields both factors of the
activation of one group of h. Codes are stored as 32-bit words (8 MXFP4 codes, 4 INT8 codes, 2
bf16) in the order of use, and with a group of 32 inputs, or a block of several, come its scales:

    strip = [fields of rows] [block] [block] ...
    block = [codes of its group] [fields]                    blocks of one group
            [fields] [codes of a group] [codes of a group] ...     of several

    codes of a group = [word][panel 4][lane 16], then the words of upper bits likewise
    field            = [element][panel 4][lane 16], elements of 1, 2 or 4 bytes
                       [element][panel 4] where rows share it (`Plane.rows`), whole cache lines

with `word` running along K. One lane is one output row, so a vector load brings the same inputs
of 16 rows and no horizontal sum is ever needed. Packing is a transposition of 32-bit words; the
nibble order inside a word is answered by the order in which activations are encoded. Everything is
whole cache lines (a group of MXFP4: 17, INT8: 34, BF16: 64), touched first in ascending order:
a kernel meets the fields of a block of several groups before its codes, and those of a single group
when it has summed that up. The last block of a row ends with its last group.

Rows past the last one are zero bits (MXFP4: scale 2^-127; INT8: scale 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hybrid_moe.formats.weight_format import GROUP as GROUP
from hybrid_moe.formats.weight_format import LayerFormats, Plane, WeightFormat, layer_formats

PANEL_ROWS = 16
PANELS = 4
STRIP_ROWS = PANELS * PANEL_ROWS
SUMS_BYTES = 4 * STRIP_ROWS
"""Of what a strip gives for one token: float32 [64]."""
LINE = 64
MOST_BLOCK_TOKENS = 32
"""Tokens of the largest block that a matrix unit's kernel writes whole; sums have room for it."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class StripField:
    """A plane of a format beside the codes, as it lies in a block, or in front of all blocks.

    Attributes:
        name: of the plane.
        offset: from where the fields begin.
        count: elements of a row (or of rows that share them).
        itemsize: bytes of an element.
        shared: one element for each panel, not for each row.
    """

    name: str
    offset: int
    count: int
    itemsize: int
    shared: bool

    @property
    def element_bytes(self) -> int:
        """From one element to the next: those of all four panels."""
        return self.itemsize * (PANELS if self.shared else STRIP_ROWS)

    @property
    def panel_bytes(self) -> int:
        """From one panel's share of an element to the next."""
        return self.itemsize * (1 if self.shared else PANEL_ROWS)

    @property
    def nbytes(self) -> int:
        """Of the field: whole lines."""
        return round_up(self.count * self.element_bytes, LINE)


def _fields(planes: list[Plane], inputs: int) -> tuple[StripField, ...]:
    """Fields of planes for so many inputs (0: of a row), one behind the other."""
    fields: list[StripField] = []
    offset = 0
    for plane in planes:
        count = plane.count * (inputs // plane.per if inputs else 1)
        field = StripField(plane.name, offset, count, plane.dtype.itemsize, plane.rows > 1)
        fields.append(field)
        offset += field.nbytes
    return tuple(fields)


def _size(fields: tuple[StripField, ...]) -> int:
    return sum(field.nbytes for field in fields)


@dataclass(frozen=True)
class StripLayout:
    """Sizes of the strips of a matrix with K inputs.

    Attributes:
        groups: K / 32.
        words: 32-bit words of codes that a row has in a group.
        high_words: the same of upper bits.
        block_groups: groups of a block, a power of two; the last block may have fewer.
        fields: of a block.
        row_fields: of a row.
    """

    groups: int
    words: int
    high_words: int
    block_groups: int
    fields: tuple[StripField, ...]
    row_fields: tuple[StripField, ...]

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a group's codes, upper bits included."""
        return 4 * STRIP_ROWS * (self.words + self.high_words)

    @cached_property
    def high_offset(self) -> int:
        """From a group's codes to their upper bits."""
        return 4 * STRIP_ROWS * self.words

    @cached_property
    def field_bytes(self) -> int:
        """Bytes of a block's fields."""
        return _size(self.fields)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes in front of the first block."""
        return _size(self.row_fields)

    @property
    def fields_first(self) -> bool:
        """Whether a block's fields lie in front of its codes."""
        return self.block_groups > 1

    @cached_property
    def block_bytes(self) -> int:
        """From one block to the next."""
        return self.block_groups * self.code_bytes + self.field_bytes

    @property
    def group_bytes(self) -> int:
        """From one group to the next, in blocks of one group."""
        assert self.block_groups == 1
        return self.block_bytes

    @property
    def blocks(self) -> int:
        """Blocks of a strip, the last one included that may be short."""
        return -(-self.groups // self.block_groups)

    @cached_property
    def nbytes(self) -> int:
        """From one strip to the next."""
        return self.row_bytes + self.blocks * self.field_bytes + self.groups * self.code_bytes

    @property
    def first_codes(self) -> int:
        """From a block to its first group's codes."""
        return self.field_bytes if self.fields_first else 0

    @property
    def first_fields(self) -> int:
        """From a block to its fields."""
        return 0 if self.fields_first else self.code_bytes

    def codes_at(self, group: int) -> int:
        """Bytes in front of a group's codes."""
        block, index = divmod(group, self.block_groups)
        return self._block_at(block) + self.first_codes + index * self.code_bytes

    def fields_at(self, block: int) -> int:
        """Bytes in front of a block's fields."""
        return self._block_at(block) + self.first_fields

    def _block_at(self, block: int) -> int:
        return self.row_bytes + block * self.block_bytes

    def field(self, name: str) -> StripField:
        """The field of that name, of a block or of a row."""
        return next(f for f in (*self.fields, *self.row_fields) if f.name == name)


@lru_cache(maxsize=256)
def strip_layout(fmt: WeightFormat, K: int) -> StripLayout:
    """Layout of the strips of an (any number of rows) x K matrix of `fmt`."""
    if K <= 0 or K % fmt.k_multiple:
        raise ValueError(f"{fmt.name}: K = {K} must be a positive multiple of {fmt.k_multiple}")
    planes = [p for p in fmt.planes if p.name not in ("codes", "high")]
    in_blocks = [p for p in planes if p.per]
    block = max([GROUP, *(p.per for p in in_blocks)])
    return StripLayout(
        groups=K // GROUP,
        words=GROUP * fmt.code.bits // 32,
        high_words=fmt.code.high_bits,
        block_groups=block // GROUP,
        fields=_fields(in_blocks, block),
        row_fields=_fields([p for p in planes if not p.per], 0),
    )


def packed_nbytes(fmt: WeightFormat | LayerFormats, hidden: int, intermediate: int) -> int:
    """Bytes of one expert in strips, without biases. A strip of gate and up has 32 rows of each,
    one of down 64: its rows are rounded up."""
    formats = layer_formats(fmt)
    gate_up = strip_layout(formats.gate_up, hidden)
    down = strip_layout(formats.down, intermediate)
    return (intermediate // GROUP) * gate_up.nbytes + -(-hidden // STRIP_ROWS) * down.nbytes


def bias_nbytes(hidden: int, intermediate: int) -> int:
    """Bytes of one expert's biases behind its strips: float32, one for each row of the strips."""
    return 4 * (2 * intermediate + round_up(hidden, STRIP_ROWS))
