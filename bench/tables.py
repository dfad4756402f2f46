"""Columns of every benchmark's table: the benchmark prints them, the report stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """Heading, and a point's text under it.

    Attributes:
        needs: key of a point; the table has the column if its first point has the key.
    """

    heading: str
    text: Callable[[Point], str]
    needs: str | None = None


def text(heading: str, template: str) -> Column:
    """A format string over the fields of a point."""
    return Column(heading, lambda p: template.format(**p))


def number(heading: str, key: str, decimals: int = 0, optional: bool = False) -> Column:
    """A field with some decimals (as it is, if it is no float); empty where it is None."""

    def shown(p: Point) -> str:
        value = p[key]
        if value is None:
            return ""
        return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    return Column(heading, shown, key if optional else None)


def percent(heading: str, part: str, whole: str) -> Column:
    """One field of another; empty where there is none."""

    def shown(p: Point) -> str:
        return "" if p[part] is None else f"{100 * p[part] / p[whole]:.0f}"

    return Column(heading, shown)


def share(heading: str, key: str) -> Column:
    """A part of 1 as percent; empty where it is None."""
    return Column(heading, lambda p: "" if p[key] is None else f"{100 * p[key]:.0f}")


def ratio(heading: str, key: str) -> Column:
    """How many times; empty where it is None."""
    return Column(heading, lambda p: "" if p[key] is None else f"{p[key]:.2f} x")


Rows = tuple[list[str], list[list[str]]]


def rows(columns: Sequence[Column], points: Iterable[Point]) -> Rows:
    """Headings, and the texts of each point."""
    points = list(points)
    shown = [c for c in columns if c.needs is None or (points and c.needs in points[0])]
    return [c.heading for c in shown], [[c.text(p) for c in shown] for p in points]


def markdown(columns: Sequence[Column], points: Iterable[Point]) -> str:
    """A table, right-aligned but for its first column."""
    header, body = rows(columns, points)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(console: Console, title: str, columns: Sequence[Column], points: Iterable[Point]) -> None:
    """Print the same table."""
    header, body = rows(columns, points)
    table = Table(title=title)
    for i, heading in enumerate(header):
        table.add_column(heading, justify="right" if i else "left")
    for line in body:
        table.add_row(*line)
    console.print(table)


OTHERS = Column("others", lambda p: f"{100 * p['others']:.0f} %" if p["others"] > 0.01 else "")
"""What other processes and guests had of the processors, for the screen."""

READ_CEILINGS = (
    text("who reads", "{where}"),
    number("threads", "threads"),
    number("in order, GB/s", "in_order", 1),
    number("random 4 MiB blocks, GB/s", "at_random", 1),
)

MOE_LAYER = (
    text("method, shape, threads, tier", "{method} {shape}, {threads} threads, {isa}"),
    number("tokens", "tokens"),
    number("ms", "ms", 2),
    number("GB/s of weights", "weight_bandwidth", 2),
    number("read now", "read_bandwidth", 1),
    number("1 thread reads", "one_thread_reads", 1, optional=True),
    Column("memory is", lambda p: {True: "quiet", False: "busy", None: ""}[p["quiet"]], "quiet"),
    percent("% of read", "weight_bandwidth", "read_bandwidth"),
    number("GMAC/s", "rate", 1),
    number("peak", "rate_ceiling"),
    percent("% of peak", "rate", "rate_ceiling"),
    number("tokens/s", "tokens_per_s", 1),
)


def _of_plan(p: Point) -> str:
    """Measured over predicted speeds; of ours alone, which is what is planned."""
    shown = [p["prefill_of_plan"], p["decode_of_plan"]] if p["planned"] else []
    return ", ".join(f"{value:.2f}" for value in shown if value is not None)


END_TO_END = (
    text("model", "{model}"),
    text("linear", "{dense}"),
    text("engine", "{engine}"),
    Column("context", lambda p: f"{p['context']}" + ("" if p["computed"] else ", filled")),
    number("prefill, tok/s", "prefill_tokens_per_s", 1),
    share("% of peak", "prefill_share"),
    ratio("we are", "ours_prefills_faster"),
    number("decode, tok/s", "decode_tokens_per_s", 2),
    number("read, GB/s", "read_bandwidth", 1),
    number("roofline, tok/s", "roofline", 2),
    share("% of it", "decode_share"),
    ratio("we are", "ours_decodes_faster"),
    Column("memory, GB", lambda p: f"{p['memory'] / 1e9:.2f}"),
    Column("memory / plan", lambda p: f"{p['memory'] / p['planned']:.3f}" if p["planned"] else ""),
    Column("prefill, decode / plan", _of_plan),
)

DENSE = (
    text("layer", "{layer}"),
    text("format", "{format}"),
    number("tokens", "tokens"),
    number("ms", "ms", 3),
    number("GB/s of weights", "weight_bandwidth", 2),
    number("read now", "read_bandwidth", 1),
    percent("% of read", "weight_bandwidth", "read_bandwidth"),
    number("GMAC/s", "rate", 1),
    number("peak", "rate_ceiling"),
    percent("% of peak", "rate", "rate_ceiling"),
    number("torch BF16, ms", "torch_ms", 3),
    ratio("ours is faster", "ours_is_faster"),
)

PAIRED = (
    text("layer", "{method} {shape}"),
    number("threads", "threads"),
    number("tokens", "tokens"),
    number("before, ms", "before_ms", 3),
    number("after", "ms", 3),
    text("gain", "{gain:.3f} ± {error:.3f}"),
    Column("rounds", lambda p: str(len(p["gains"]))),
    *MOE_LAYER[3:-1],
)

POOL = (
    text("layer, state, caller", "{job}, {state}, {caller}"),
    number("threads", "threads"),
    number("median", "median_us", 2),
    number("p99", "p99_us", 2),
    number("bare signal", "signal_us", 2),
    percent("% of it", "signal_us", "median_us"),
    number("Python adds", "python_us", 1),
)

POOL_WANTED = "Wanted of the tiny layer with two threads: at most 3 hot and 60 from sleep."

LOAD = (
    number("round", "round"),
    number("system hands out, GB/s", "first_touch_GBps", 2),
    number("load, GB/s", "GBps", 2),
    number("again, GB/s", "again_GBps", 2),
    number("peak memory / packed", "peak_over_packed", 3),
    number("disk gives, GB/s", "disk_GBps", 2, optional=True),
    number("load from it", "from_disk_GBps", 2, optional=True),
    number("from a packed cache", "from_cache_GBps", 2, optional=True),
)

PACKING = (text("format", "{format}"), number("GB/s", "GBps", 1))

BIG = (
    text("model", "{model}"),
    Column("experts, GB", lambda p: f"{p['expert_bytes'] / 1e9:.1f}"),
    number("disk gives, GB/s", "disk_GBps", 2),
    number("load, GB/s", "load_GBps", 2),
    number("seconds", "load_s", 1),
    number("packed / stored", "packed_over_stored", 3),
    number("peak memory / plan", "peak_over_plan", 3),
    number("decode, tok/s", "decode_tokens_per_s", 2),
    percent("% of the roofline", "decode_tokens_per_s", "roofline_tokens_per_s"),
    number("prefill, tok/s", "prefill_tokens_per_s", 1),
    number("second start, s", "second_start_s", 1, optional=True),
)

QUICK = (
    text("figure", "{name}"),
    text("value", "{value:.3g} {unit}"),
)

STEPS = (
    number("step", "step", optional=True),
    number("tokens", "tokens", optional=True),
    number("threads", "threads", optional=True),
    number("tier", "tier", optional=True),
    number("instructions per 64 bytes", "instructions", 0, optional=True),
    number("cycles: counted", "cycles_counted", 1, optional=True),
    number("from the cache", "cycles_cached", 1, optional=True),
    number("from memory", "cycles", 1, optional=True),
    number("GB/s", "GBps", 1, optional=True),
    number("% of read", "share", 0, optional=True),
    number("GMAC/s, packed", "direct_GMACps", 1, optional=True),  # older receipts: from memory
    number("unpacked", "unpacked_GMACps", 1, optional=True),
    number("GMAC/s from the cache: packed", "direct_cached", 1, optional=True),
    number("unpacked", "unpacked_cached", 1, optional=True),
    number("tokens of a tile", "tile", optional=True),
    number("instructions per 64 bytes, token", "tile_instructions", 1, optional=True),
)

ERRORS = (
    text("library", "{label}"),
    text("method", "{method}"),
    number("inputs N(0, 1)", "normal", 4),
    number("8 channels × 40", "outliers", 4),
)

ACCURACY = (
    text("format", "{method}"),
    number("inputs N(0, 1)", "normal", 5),
    number("8 channels × 40", "outliers", 5),
    number("bf16 floor", "floor", 5),
    number("weights", "weights", 4),
)
