"""Where a kernel is in a strip: the addresses of a group's codes and of what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import Emit, Val
from hybrid_moe.formats.strips import StripField, StripLayout


@dataclass(frozen=True)
class Place:
    """A group of a strip, see `formats.strips`.

    Attributes:
        codes: address of its codes.
        fields: address of its block's fields.
        strip: address of the strip, where the fields of rows are.
        index: number of the group in its block; None in blocks of one group.
    """

    codes: Val
    fields: Val
    strip: Val
    index: Val | None = None


class StripCursor:
    """Goes through the groups of a strip in ascending order."""

    def __init__(self, emit: Emit, layout: StripLayout, strip: Val, begin: Val) -> None:
        """Args: `strip` is the strip's address, `begin` the first group."""
        self._layout, self._strip = layout, strip
        n = layout.block_groups
        start = strip + layout.row_bytes
        if n == 1:
            self._codes = emit.var(start + begin * layout.block_bytes)
            return
        index = begin & (n - 1)
        block = start + (begin >> (n.bit_length() - 1)) * layout.block_bytes
        self._fields = emit.var(block)
        self._index = emit.var(index)
        self._codes = emit.var(block + layout.field_bytes + index * layout.code_bytes)

    @property
    def place(self) -> Place:
        """The group under the cursor."""
        codes = self._codes.get()
        if self._layout.block_groups == 1:
            return Place(codes, codes + self._layout.code_bytes, self._strip)
        return Place(codes, self._fields.get(), self._strip, self._index.get())

    @property
    def next_codes(self) -> Val:
        """Address of the codes of the group behind it."""
        layout, codes = self._layout, self._codes.get()
        if layout.block_groups == 1:
            return codes + layout.block_bytes
        return codes + layout.code_bytes + self._is_last.select(layout.field_bytes, codes - codes)

    def advance(self) -> None:
        """To the group behind it."""
        layout = self._layout
        following = self.next_codes
        if layout.block_groups > 1:
            is_last, index = self._is_last, self._index.get() + 1
            block = self._codes.get() + layout.code_bytes
            self._fields.set(is_last.select(block, self._fields.get()))
            self._index.set(is_last.select(index - index, index))
        self._codes.set(following)

    @property
    def _is_last(self) -> Val:
        return (self._index.get() + 1).equals(self._layout.block_groups)


def field_address(place: Place, layout: StripLayout, field: StripField, panel: Val | int) -> Val:
    """Where a panel's first element of a field of the place's block, or row, is."""
    base = place.strip if field in layout.row_fields else place.fields
    return panel_address(base + field.offset, panel, field.panel_bytes)


def panel_address(at: Val, panel: Val | int, nbytes: int) -> Val:
    """Where the `nbytes` of a panel begin in an array [panel]."""
    return at + panel * nbytes
