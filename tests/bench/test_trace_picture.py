"""Pictures of traces: rows, layers' colours, arrows."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

import trace_picture

from hybrid_moe.cpu_kernels.trace_file import TraceNote, events

MS = 1_000_000
NOTES = [
    TraceNote("link", "layer 3: 5 ahead", 1 * MS, 3 * MS, {"bytes": 7}, "wave 0"),
    TraceNote("GPU", "layer 3: experts sent", 4 * MS, 5 * MS, {}, "wave 0"),
    TraceNote("GPU", "layer 3: experts in slots", 3 * MS, 4 * MS),
]


def test_rows_and_arrows() -> None:
    made = events([], [], 0, 10 * MS, NOTES)
    rows = trace_picture.rows_of(made)
    assert {name: len(row) for name, row in rows.items()} == {"link": 1, "GPU": 2}
    assert rows["link"][0]["args"] == {"bytes": 7} and rows["link"][0]["dur"] == 2000
    ((start, end),) = trace_picture.arrows_of(made)
    assert (start["ts"], end["ts"]) == (1000, 4000) and start["ph"] + end["ph"] == "sf"
    figure = trace_picture.draw(made, ["GPU", "link"], 0, 10)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["GPU", "link"]
    assert len(axes.patches) == 3
    assert trace_picture.layer_of("attention of layer 12") == 12
    for name, text in (
        ("attention of layer 12", "12: attention"),
        ("layer 3: experts sent", "3: sent"),
        ("16 experts of layer 2", "2: 16 experts"),
        ("layer 1", "1"),
        ("torch", "torch"),
    ):
        assert trace_picture.short(name) == text


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="has no row 'CPU', but 'link', 'GPU'"):
        trace_picture.draw(events([], [], 0, 1, NOTES), ["CPU"], 0, 1)
