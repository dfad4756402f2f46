"""Stored results as SVG pictures (matplotlib, the `bench` extra)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from comparison import OURS, PEERS, by_point, peak_share, read_share
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
    """Points by what `title`, a format string over their fields, makes of them; fewest tokens
    first, whatever the order in which they were measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for p in sorted(points, key=lambda p: p["tokens"]):
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


def ceiling_shares(document: dict[str, Any]) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """What the roofline shows: a layer, and library -> [(tokens, percent of its ceiling)].

    The ceiling of a point is the least time that the machine allows: that of reading the weights at
    the read bandwidth of the moment, or that of the multiplications at the peak of our tier's
    instruction, whichever is longer. Of the layers beside peers the one with most libraries is
    shown, then with most points; without peers our own, with all threads.

    Raises:
        ValueError: the document has neither.
    """
    benches = document["benches"]
    layers: dict[tuple[str, str, int], dict[str, list[tuple[int, float]]]] = {}
    if "peers" in benches:
        for (method, shape, tokens, threads), points in by_point(
            benches["peers"]["points"]
        ).items():
            for library, p in points.items():
                lines = layers.setdefault((method, shape, threads), {})
                share = 100 * max(read_share(p), peak_share(p))
                lines.setdefault(library, []).append((tokens, share))
    elif "moe_layer" in benches:
        points = benches["moe_layer"]["points"]
        best = {p["method"]: p["isa"] for p in reversed(points)}  # others come later
        for p in points:
            if p["isa"] == best[p["method"]]:
                share = max(p["weight_bandwidth"] / p["read_bandwidth"],
                            p["rate"] / p["rate_ceiling"])  # fmt: skip
                lines = layers.setdefault((p["method"], p["shape"], p["threads"]), {})
                lines.setdefault(OURS, []).append((p["tokens"], 100 * share))
    if not layers:
        raise ValueError("no measured layer: neither peers nor moe_layer")

    def weight(key: tuple[str, str, int]) -> tuple[int, int, int, str]:
        method, _, threads = key
        lines = layers[key]
        return len(lines), sum(map(len, lines.values())), threads, method  # MXFP4 after BF16

    method, shape, threads = chosen = max(layers, key=weight)
    many = "thread" if threads == 1 else "threads"
    return (
        f"{method}, layer {shape}, {threads} {many}",
        {name: sorted(layers[chosen][name]) for name in (OURS, *PEERS) if name in layers[chosen]},
    )


_LEAST_GAP = 6.0
"""Percent between two names at the right edge."""


def roofline(document: dict[str, Any]) -> Figure:
    """One panel, one line for each library, their names at its ends."""
    layer, lines = ceiling_shares(document)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
    panel = figure.subplots()
    panel.axhline(100, color="#555555", linewidth=1, linestyle="--")
    panel.annotate(
        "what memory and the dot product's instruction allow", (0.01, 100), xytext=(0, 3),
        xycoords=("axes fraction", "data"), textcoords="offset points", color="#555555",
    )  # fmt: skip
    height = -_LEAST_GAP
    for library, line in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        tokens, shares = zip(*line, strict=True)
        ours, color = library == OURS, COLORS[library]
        panel.plot(tokens, shares, marker="o", color=color, linewidth=3 if ours else 1.5)
        height = max(shares[-1], height + _LEAST_GAP)
        panel.annotate(
            "hybrid_moe" if ours else library, (tokens[-1], height), xytext=(8, 0),
            textcoords="offset points", va="center", color=color, annotation_clip=False,
            fontweight="bold" if ours else "normal",
        )  # fmt: skip
    panel.set_title(f"Share of the ceiling: {layer}\n{document['processor']}", fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens in a call")
    panel.set_ylabel("%")
    panel.set_ylim(0, 112)
    _token_ticks(panel, {t for line in lines.values() for t, _ in line})
    return figure


PLOTS: Mapping[str, Callable[[Bench], Figure]] = MappingProxyType(
    {"moe_layer": shares, "peers": times}
)
"""Benchmark -> its picture."""


def draw_roofline(document: dict[str, Any], path: Path) -> None:
    """Write the picture that README shows."""
    with mpl.rc_context(_STYLE):
        roofline(document).savefig(path, format="svg", metadata={"Date": None})


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
