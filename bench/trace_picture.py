"""A picture of a trace: its rows as bars, its arrows as lines.

    python bench/throttled.py --trace prefill.json     # or HYBRID_MOE_TRACE=FILE of any process
    python bench/trace_picture.py prefill.json prefill.svg --rows "GPU" "CPU, emulated" "link"

Perfetto (https://ui.perfetto.dev) shows all of a trace; this is what a page can hold of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = plt.colormaps["tab10"].colors  # type: ignore[attr-defined]

Event = dict[str, Any]


def rows_of(events: list[Event]) -> dict[str, list[Event]]:
    """Complete events by the name of their row."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[names.get(event["tid"], str(event["tid"]))].append(event)
    return found


def layer_of(name: str) -> int | None:
    """The layer that an event's name says, for its colour."""
    match = re.search(r"layer (\d+)", name)
    return None if match is None else int(match[1])


def short(name: str) -> str:
    """An event's name, as a bar has room for it: its layer first."""
    match = re.fullmatch(r"(?:(.*) of )?layer (\d+)(?:: (.*))?", name)
    if match is None:
        return name
    what = (match[1] or match[3] or "").removeprefix("experts ")
    return f"{match[2]}: {what}" if what else match[2]


def arrows_of(events: list[Event]) -> list[list[Event]]:
    """The steps of each arrow, in order."""
    flows: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf" and event.get("cat") == "flow":
            flows[event["id"]].append(event)
    return [sorted(steps, key=lambda e: float(e["ts"])) for steps in flows.values()]


def draw(events: list[Event], rows: list[str], begin: float, end: float) -> Any:
    """A figure of these rows, from `begin` to `end` ms of the trace.

    Raises:
        ValueError: the trace has no such row; the message says which it has.
    """
    found = rows_of(events)
    if missing := [row for row in rows if row not in found]:
        raise ValueError(f"the trace has no row {missing[0]!r}, but {', '.join(map(repr, found))}")
    numbers = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    height = {numbers[row]: -at for at, row in enumerate(rows)}
    figure, axes = plt.subplots(figsize=(10, 0.7 * len(rows) + 1))
    for row in rows:
        at = height[numbers[row]]
        for event in found[row]:
            first, last = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
            if last < begin or first > end:
                continue
            layer = layer_of(event["name"])
            colour = "lightgrey" if layer is None else COLOURS[layer % len(COLOURS)]
            left, right = max(first, begin) - begin, min(last, end) - begin
            axes.barh(at, right - left, left=left, height=0.6, color=colour, edgecolor="white")
            text, room = short(event["name"]), (right - left) / (end - begin)
            if room > 0.009 * len(text):
                axes.text((left + right) / 2, at, text, ha="center", va="center", fontsize=6)
    for steps in arrows_of(events):
        inside = [s for s in steps if s["tid"] in height and begin <= s["ts"] / 1e3 <= end]
        for one, other in itertools.pairwise(inside):
            axes.annotate(
                "",
                (other["ts"] / 1e3 - begin, height[other["tid"]]),
                (one["ts"] / 1e3 - begin, height[one["tid"]]),
                arrowprops={"arrowstyle": "->", "lw": 0.6, "color": "dimgrey"},
            )
    axes.set_yticks([-at for at in range(len(rows))], [r.partition(",")[0] for r in rows])
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("ms")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", nargs="+", required=True, help="names of rows, from the top")
    parser.add_argument("--from", dest="begin", type=float, default=0.0, help="ms of the trace")
    parser.add_argument("--to", dest="end", type=float, help="ms of the trace; default: its end")
    args = parser.parse_args()
    events = json.loads(args.trace.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    end = args.end or max(e["ts"] + e["dur"] for e in spans) / 1e3
    draw(events, args.rows, args.begin, end).savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
