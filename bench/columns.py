"""Columns of the tables that `bench/steps.py` prints and `bench/report.py` stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """Heading, and decimals of a number."""

    heading: str
    decimals: int = 1

    def text(self, value: float | str) -> str:
        """A value as the table shows it."""
        return f"{value:.{self.decimals}f}" if isinstance(value, float) else str(value)


COLUMNS: Mapping[str, Column] = {
    "step": Column("step"),
    "tokens": Column("tokens"),
    "threads": Column("threads"),
    "tier": Column("tier"),
    "instructions": Column("instructions per 64 bytes", 0),
    "cycles_counted": Column("cycles: counted"),
    "cycles_cached": Column("from the cache"),
    "cycles": Column("from memory"),
    "GBps": Column("GB/s"),
    "share": Column("% of read", 0),
    "direct_GMACps": Column("GMAC/s, packed"),
    "unpacked_GMACps": Column("unpacked"),
    "tile": Column("tokens of a tile"),
    "tile_instructions": Column("instructions per 64 bytes, token"),
}
"""Keys of points that tables show, in their order."""
