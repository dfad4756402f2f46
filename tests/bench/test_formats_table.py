"""docs/formats.md is what the tables give, with what has been measured."""

from __future__ import annotations

from pathlib import Path

import formats_table
import pytest
import report

from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.formats.weight_format import WeightFormat
from tests.bench.receipts import every_bench


def test_the_committed_pages_are_up_to_date() -> None:
    """`python bench/formats_table.py` writes them."""
    assert formats_table.PAGE.read_text() == formats_table.page(formats_table.RESULTS)
    numerics = formats_table.NUMERICS.read_text()
    assert formats_table.with_errors(numerics, formats_table.RESULTS) == numerics


def test_every_method_and_format_has_a_row(tmp_path: Path) -> None:
    page = formats_table.page(tmp_path)
    assert set(formats_table.CHECKPOINTS) == set(METHODS)
    for name in (*METHODS, *FORMATS):
        assert f"| `{name}` |" in page
    assert page.count("Not measured yet.") == 2


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_nothing_is_expanded(fmt: WeightFormat) -> None:
    """At most 2 % more than a checkpoint stores."""
    assert 1 <= formats_table.strip_overhead(fmt) <= 1.02


def test_measured_columns_come_from_the_newest_results(tmp_path: Path) -> None:
    report.store(report.join(every_bench()), tmp_path)
    page = formats_table.page(tmp_path)
    assert "P (x), 2 cores, 2026-01-02" in page
    speed = next(line for line in page.splitlines() if line.startswith("| MXFP4 | 2 |"))
    # 40 MB in 2 ms where 25 GB/s are read and 40 decoded; ggml takes twice as long
    assert [cell.strip() for cell in speed.split("|")[3:9]] == [
        "20.0",
        "25.0",
        "40.0",
        "80",
        "",
        "2.00 x",
    ]
    assert "| Q4_K+int8 | 0.01170 | 0.02000 | 0.00170 |  |" in page
    assert "Not measured: MXFP4, INT8" in page


def test_marks_are_needed() -> None:
    with pytest.raises(SystemExit, match="has no lines"):
        formats_table.with_errors("# Numerics", formats_table.RESULTS)
