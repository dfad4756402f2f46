"""Stored results as SVG pictures (matplotlib, the `bench` extra)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from comparison import OURS, PEERS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Bench = dict[str, Any]

COLORS = {OURS: "#0072b2", "kt-kernel": "#d55e00", "ggml": "#009e73", "torch": "#999999"}
READ_COLOR, PEAK_COLOR = "#0072b2", "#d55e00"
_COLUMNS = 3

_STYLE: Any = {
    "svg.hashsalt": "hybrid_moe",  # the same points give the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
}


def _panels(titles: list[str], label: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per title, tokens on a logarithmic x axis."""
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.8 * rows), layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.set_ylabel(label)
    return figure, panels


def _token_ticks(panel: Axes, tokens: set[int]) -> None:
    panel.set_xticks(sorted(tokens), [str(t) for t in sorted(tokens)])
    panel.minorticks_off()


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One for all panels, above them."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )


def _groups(points: list[dict[str, Any]], title: str) -> dict[str, list[dict[str, Any]]]:
    """Points by what `title`, a format string over their fields, makes of them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for p in points:
        groups.setdefault(title.format(**p), []).append(p)
    return groups


def shares(bench: Bench) -> Figure:
    """Our layer: percent of both ceilings over tokens."""
    groups = _groups(bench["points"], "{method} {shape}, {isa}, threads: {threads}")
    figure, panels = _panels(list(groups), "% of the ceiling")
    for panel, group in zip(panels, groups.values(), strict=False):
        tokens = [p["tokens"] for p in group]
        for label, color, value, ceiling in (
            ("read bandwidth", READ_COLOR, "weight_bandwidth", "read_bandwidth"),
            ("peak multiply-accumulates", PEAK_COLOR, "rate", "rate_ceiling"),
        ):
            percent = [100 * p[value] / p[ceiling] for p in group]
            panel.plot(tokens, percent, marker="o", color=color, label=label)
        panel.axhline(100, color="#555555", linewidth=0.8, linestyle=":")
        panel.set_ylim(bottom=0)
        _token_ticks(panel, set(tokens))
    _legend(figure, panels)
    return figure


def times(bench: Bench) -> Figure:
    """All libraries: milliseconds per token over tokens."""
    groups = _groups(bench["points"], "{method} {shape}, threads: {threads}")
    figure, panels = _panels(list(groups), "ms per token")
    for panel, group in zip(panels, groups.values(), strict=False):
        for library in (OURS, *PEERS):
            mine = [p for p in group if p["library"] == library]
            if mine:
                panel.plot(
                    [p["tokens"] for p in mine],
                    [p["ms"] / p["tokens"] for p in mine],
                    marker="o",
                    color=COLORS[library],
                    label="hybrid_moe" if library == OURS else library,
                )
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        _token_ticks(panel, {p["tokens"] for p in group})
    _legend(figure, panels)
    return figure


PLOTS: Mapping[str, Callable[[Bench], Figure]] = MappingProxyType(
    {"moe_layer": shares, "peers": times}
)
"""Benchmark -> its picture."""


def draw(document: dict[str, Any], folder: Path, stem: str) -> dict[str, str]:
    """Write the pictures of a stored document.

    Returns:
        Benchmark -> name of the picture in `folder`.
    """
    pictures = {}
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            if name in document["benches"]:
                file = f"{stem}-{name.replace('_', '-')}.svg"
                plot(document["benches"][name]).savefig(
                    folder / file, format="svg", metadata={"Date": None}
                )
                pictures[name] = file
    return pictures
