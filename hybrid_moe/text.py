"""How numbers are written in messages and tables, and how users write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def format_bytes(nbytes: int) -> str:
    """Bytes in the unit that keeps the number readable."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"


def format_ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def parse_size(text: str) -> int:
    """Bytes of "24GB", "512 MiB", "1.5T". Units are powers of two, as memory is sold.

    Raises:
        ValueError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    nbytes = round(float(match[1]) * (1 << _UNITS[match[2]])) if match else 0
    if nbytes < 1:
        raise ValueError(f'size "{text}" must be a positive number with a unit, such as 24GB')
    return nbytes
