"""A square of 32-bit words on its side: rows of memory become vectors over rows."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import Val


def lanes128(a: Val, b: Val, lanes: Sequence[int]) -> Val:
    """128-bit lanes of (a, b) by number."""
    return a.shuffle([4 * lane + i for lane in lanes for i in range(4)], b)


def _within128(a: Val, b: Val, lanes: Sequence[int]) -> Val:
    """The same four of each 128-bit lane of a (0 to 3) and b (4 to 7)."""
    return a.shuffle([4 * q + i % 4 + 16 * (i // 4) for q in range(4) for i in lanes], b)


def transpose(rows: Sequence[Val]) -> list[Val]:
    """16 vectors of 16 lanes of 32 bits, transposed."""
    # columns[c][g]: in 128-bit lane q column 4q + c of rows 4g to 4g+3
    columns: list[list[Val]] = [[], [], [], []]
    for g in range(0, 16, 4):
        for i in (0, 2):
            upper, lower = (
                _within128(rows[g + k], rows[g + k + 1], (i, 4 + i, i + 1, 5 + i)) for k in (0, 2)
            )
            columns[i].append(_within128(upper, lower, (0, 1, 4, 5)))
            columns[i + 1].append(_within128(upper, lower, (2, 3, 6, 7)))
    out: dict[int, Val] = {}
    for c, of_rows in enumerate(columns):
        for q in (0, 2):
            left, right = (
                lanes128(of_rows[g], of_rows[g + 1], (q, q + 1, 4 + q, 5 + q)) for g in (0, 2)
            )
            for i in range(2):
                out[4 * (q + i) + c] = lanes128(left, right, (i, 2 + i, 4 + i, 6 + i))
    return [out[column] for column in range(16)]
