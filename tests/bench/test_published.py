"""Published systems against the timeline."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import published
import pytest


def test_the_committed_page_is_up_to_date() -> None:
    """`python bench/published.py` writes it."""
    page = published.PAGE.read_text("utf-8")
    assert published.with_table(page) == page
    with pytest.raises(SystemExit, match="has no lines"):
        published.with_table("# Scheduling")


def test_errors_are_within_what_is_promised() -> None:
    """Of the page, which is what the model says: median 15 %, worst 35 %."""
    table = published.PAGE.read_text("utf-8").partition("<!-- published -->")[2]
    found = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| [+-]\d+% \|", table)
    errors = [abs(float(predicted) / float(speed) - 1) for speed, predicted in found]
    assert len(errors) == len(published.SYSTEMS) > 20
    assert statistics.median(errors) <= 0.15
    assert max(errors) <= 0.35


def test_a_system_does_not_take_part_in_its_own_prediction() -> None:
    """Three systems, one of them twice as fast as it was: the others are not asked differently."""
    rows = [row for row in published.SYSTEMS if "4x 4090" not in row.what][3:8]
    faster = [replace(row, speed=2 * row.speed) if row.what == "INT4" else row for row in rows]
    before = {one.row.what: one for one in published.leave_one_out(rows)}
    after = {one.row.what: one for one in published.leave_one_out(faster)}
    assert after["INT4"].predicted == before["INT4"].predicted
    assert after["FP8"].predicted == before["FP8"].predicted  # of the same system
    assert after["1x 4090"].predicted > before["1x 4090"].predicted


def test_a_prediction_by_hand() -> None:
    """V3 on one socket: 58 layers of 8 experts of 24.8 MB, and 9.1 GB on the GPU."""
    constants = published.Constants(0.5, 200e-6, 500e-6)
    experts = 58 * 8 * 3 * 7168 * 2048 * 4.5 / 8 / (307.2e9 * 0.5)
    rest = 16.2e9 * 4.5 / 8 / (1008e9 * 0.75)
    seconds = experts + rest + 61 * 500e-6
    assert published.predicted(published.SYSTEMS[0], constants) == pytest.approx(1 / seconds)
    curve = [row for row in published.SYSTEMS if "4x 4090" in row.what]
    speeds = [published.predicted(row, constants) for row in curve]
    assert len(speeds) == 10 and speeds == sorted(speeds)
