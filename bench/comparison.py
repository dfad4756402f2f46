"""Points of `bench/peers.py`, as its receipts have them, put into one table with ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from common import processor
from rich.console import Console
from rich.table import Table
from targets import OUR_ERROR, target_for

OURS = "ours"
PEERS = ("kt-kernel", "ggml", "torch")

Point = dict[str, Any]
Key = tuple[str, str, int, int]

HEADER = (
    "layer", "threads", "tokens", "ours, ms", "GB/s", "% of read", "GMAC/s", "% of peak",
    *(f"{peer}, ms" for peer in PEERS),
)  # fmt: skip


def by_point(points: Iterable[Point]) -> dict[Key, dict[str, Point]]:
    """(method, shape, tokens, threads) -> library -> its point. Layers are in the order in which
    they were measured first, tokens of a layer ascend."""
    groups: dict[Key, dict[str, Point]] = {}
    layers: dict[tuple[str, str, int], int] = {}
    for p in points:
        key = (p["method"], p["shape"], p["tokens"], p["threads"])
        groups.setdefault(key, {})[p["library"]] = p
        layers.setdefault((p["method"], p["shape"], p["threads"]), len(layers))

    def place(key: Key) -> tuple[int, int]:
        method, shape, tokens, threads = key
        return layers[method, shape, threads], tokens

    return {key: groups[key] for key in sorted(groups, key=place)}


def read_share(point: Point) -> float:
    """Weights read per second over the read bandwidth of the same seconds, median of rounds."""
    rounds = zip(point["rounds_ms"], point["read_bandwidths"], strict=True)
    shares = [point["weight_bytes"] / ms / 1e6 / read for ms, read in rounds]
    return float(statistics.median(shares))


def peak_share(point: Point) -> float:
    """Multiply-accumulates per second over the peak of our tier's instruction."""
    return float(point["macs"] / (point["ms"] / 1e3) / point["our_ceiling"])


def comparison(points: Iterable[Point]) -> list[list[str]]:
    """Rows under `HEADER`: ours beside its ceilings, each peer with its time over ours."""
    rows = []
    for (method, shape, tokens, threads), libraries in by_point(points).items():
        row = [f"{method} {shape}", str(threads), str(tokens)]
        ours = libraries.get(OURS)
        if ours is None:
            row += [""] * 5
        else:
            row += [
                f"{ours['ms']:.2f}",
                f"{ours['weight_bytes'] / ours['ms'] / 1e6:.1f}",
                f"{100 * read_share(ours):.0f}",
                f"{ours['macs'] / ours['ms'] / 1e6:.1f}",
                f"{100 * peak_share(ours):.0f}",
            ]
        rows.append(row + [_beside(libraries.get(peer)) for peer in PEERS])
    return rows


def _beside(point: Point | None) -> str:
    if point is None:
        return ""
    ratio = point["ours_is_faster"]
    return f"{point['ms']:.2f}" + (f" ({ratio:.2f} x)" if ratio is not None else "")


def labels(points: Iterable[Point]) -> list[str]:
    """Names, versions and kernels of the libraries, each once."""
    return list(dict.fromkeys(p["label"] for p in points))


def verdicts(points: Iterable[Point]) -> list[tuple[str, str, str, bool]]:
    """(layer, tokens, "measured of wanted", met) of every target that was measured, with the most
    threads of any point."""
    groups = by_point(points)
    most = max((threads for *_, threads in groups), default=0)
    rows = []
    for (method, shape, tokens, threads), libraries in groups.items():
        target = target_for(method, shape, tokens)
        ours = libraries.get(OURS)
        if target is None or ours is None or threads != most:
            continue
        faster = {name: p["ours_is_faster"] for name, p in libraries.items() if name != OURS}
        for text, met in target.verdicts(read_share(ours), peak_share(ours), faster):
            rows.append((f"{method} {shape}", str(tokens), text, met))
    return rows


def show(points: Sequence[Point], errors: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the tables."""
    table = Table(title=f"one call (ours is faster by), {processor()}")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "layer" else "right")
    for row in comparison(points):
        table.add_row(*row)
    console.print(table)
    console.print("; ".join(labels(points)))
    wanted = verdicts(points)
    if wanted:
        table = Table(title="targets")
        for name in ("layer", "tokens", "measured of wanted", ""):
            table.add_column(name)
        for *row, met in wanted:
            table.add_row(*row, "met" if met else "[red]missed[/]")
        console.print(table)
    if errors:
        table = Table(title="error ||y - reference|| / ||reference||, reference in float64")
        for name in ("library", "method", "normal inputs", "8 channels x 40"):
            table.add_column(name)
        for r in errors:
            table.add_row(r["label"], r["method"], f"{r['normal']:.4f}", f"{r['outliers']:.4f}")
        console.print(table)
        console.print(f"Ours should be at most {OUR_ERROR:.4f}.")
    console.print(
        "Percentages: of the read bandwidth around each point, and of the peak of our tier's "
        "instruction. Shape C runs without its biases and clamps, which not every library has."
    )
