"""Where the planes of a matrix lie in a strip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.strips import PANELS, STRIP_ROWS, StripLayout


@dataclass(frozen=True)
class PlanePlace:
    """Where a plane lies in a strip: units, each so many elements of all rows.

    Attributes:
        name: of the plane.
        offset: from the strip to the first unit.
        units: of a row.
        unit_bytes: from one unit of a block to the next.
        block_units: units of a block.
        block_bytes: from one block to the next.
        count: elements of a unit.
        itemsize: bytes of an element.
        places: of an element: one for each row, or where rows share it, for each panel.
    """

    name: str
    offset: int
    units: int
    unit_bytes: int
    block_units: int
    block_bytes: int
    count: int
    itemsize: int
    places: int = STRIP_ROWS

    @property
    def elements(self) -> int:
        """Those of a row that a strip has room for: the last block may be short."""
        return self.units * self.count


def plane_places(layout: StripLayout) -> Iterator[PlanePlace]:
    """The planes of a strip."""
    groups, n = layout.groups, layout.block_groups
    for name, offset, words in (
        ("codes", layout.codes_at(0), layout.words),
        ("high", layout.codes_at(0) + layout.high_offset, layout.high_words),
    ):
        if words:
            yield PlanePlace(
                name, offset, groups, layout.code_bytes, n, layout.block_bytes, words, 4
            )
    for fields, units, begin in (
        (layout.fields, layout.blocks, layout.fields_at(0)),
        (layout.row_fields, 1, 0),
    ):
        for field in fields:
            yield PlanePlace(
                name=field.name,
                offset=begin + field.offset,
                units=units,
                unit_bytes=0,
                block_units=1,
                block_bytes=layout.block_bytes,
                count=field.count,
                itemsize=field.itemsize,
                places=PANELS if field.shared else STRIP_ROWS,
            )


@functools.lru_cache(maxsize=64)
def element_offsets(place: PlanePlace) -> npt.NDArray[np.int64]:
    """int64 [elements]: from a strip to the first place of each element of a row, read-only."""
    unit, element = np.divmod(np.arange(place.elements), place.count)
    block, unit = np.divmod(unit, place.block_units)
    offsets: npt.NDArray[np.int64] = (
        place.offset
        + block * place.block_bytes
        + unit * place.unit_bytes
        + element * (place.places * place.itemsize)
    )
    offsets.flags.writeable = False
    return offsets
