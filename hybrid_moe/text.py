"""How numbers are written in messages and tables."""

from __future__ import annotations

from collections.abc import Sequence


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
