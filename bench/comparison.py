"""Points of `bench/peers.py`, as its receipts have them, side by side: ratios, shares of this
machine's ceilings, and whether they are what they should be.

Targets are stated for two threads; a share holds on any processor, and so does a ratio where both
libraries have their best kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tables import Column, number, text
from weights import INT8_ACTIVATIONS

OURS = "ours"
PEERS = ("kt-kernel", "ggml", "torch")

OUR_ERROR = 0.0030
"""MXFP4, ||y - reference|| / ||reference||, for plain inputs and for inputs with outliers."""

Point = dict[str, Any]
Key = tuple[str, str, int, int]


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


def decode_share(point: Point) -> float | None:
    """The same over the lower of the read bandwidth and the rate at which the tier's instructions
    decode the format (`decode.counted`); None where that was not counted."""
    counted = point.get("counted_rate")
    if not counted:
        return None
    rounds = zip(point["rounds_ms"], point["read_bandwidths"], strict=True)
    rates = [(point["weight_bytes"] / ms / 1e6, read) for ms, read in rounds]
    return float(statistics.median(rate / min(read, counted) for rate, read in rates))


def peak_share(point: Point) -> float:
    """Multiply-accumulates per second over the peak of our tier's instruction."""
    return float(point["macs"] / (point["ms"] / 1e3) / point["our_ceiling"])


def _ours(heading: str, shown: Callable[[Point], str]) -> Column:
    return Column(heading, lambda row: shown(row[OURS]) if OURS in row else "")


def _beside(peer: str) -> Column:
    """Its time, and its time over ours."""

    def shown(row: Mapping[str, Any]) -> str:
        point = row.get(peer)
        if point is None:
            return ""
        ratio = point["ours_is_faster"]
        return f"{point['ms']:.2f}" + (f" ({ratio:.2f} x)" if ratio is not None else "")

    return Column(f"{peer}, ms", shown)


COLUMNS = (
    text("layer", "{layer}"),
    number("threads", "threads"),
    number("tokens", "tokens"),
    _ours("ours, ms", lambda p: f"{p['ms']:.2f}"),
    _ours("GB/s", lambda p: f"{p['weight_bytes'] / p['ms'] / 1e6:.1f}"),
    _ours("% of read", lambda p: f"{100 * read_share(p):.0f}"),
    _ours("GMAC/s", lambda p: f"{p['macs'] / p['ms'] / 1e6:.1f}"),
    _ours("% of peak", lambda p: f"{100 * peak_share(p):.0f}"),
    *map(_beside, PEERS),
)

FORMAT_COLUMNS = (
    *COLUMNS[:6],
    _ours("decodes, GB/s", lambda p: f"{p['counted_rate']:.0f}" if p["counted_rate"] else ""),
    _ours("% of both", lambda p: "" if (s := decode_share(p)) is None else f"{100 * s:.0f}"),
    *COLUMNS[6:],
)
"""Of every format: the counted decode rate beside the read bandwidth, the share of the lower."""


def side_by_side(points: Iterable[Point]) -> list[dict[str, Any]]:
    """Rows of `COLUMNS`: for each point the libraries that ran it, by name."""
    return [
        {"layer": f"{method} {shape}", "tokens": tokens, "threads": threads, **libraries}
        for (method, shape, tokens, threads), libraries in by_point(points).items()
    ]


def labels(points: Iterable[Point]) -> list[str]:
    """Names, versions and kernels of the libraries, each once."""
    return list(dict.fromkeys(p["label"] for p in points))


@dataclass(frozen=True)
class Target:
    """Least shares (0 to 1) and ratios at one point.

    Attributes:
        read: of the read bandwidth of the same seconds.
        decode: of the lower of that and the tier's counted decode rate, on any number of threads.
        peak: of the peak multiply-accumulates of the tier.
        rate: 10^9 multiply-accumulates a second.
        faster: library -> its time over ours.
    """

    method: str
    shape: str
    tokens: int
    read: float | None = None
    peak: float | None = None
    decode: float | None = None
    rate: float | None = None
    faster: Mapping[str, float] = field(default_factory=dict)

    def verdicts(
        self,
        read: float,
        peak: float,
        faster: Mapping[str, float],
        decode: float | None = None,
        rate: float = 0.0,
    ) -> list[tuple[str, bool]]:
        """Each part as ("wanted: measured", met); parts whose library did not run are left out."""
        parts = []
        shares = (
            ("read", self.read, read), ("decode", self.decode, decode), ("peak", self.peak, peak),
        )  # fmt: skip
        for name, least, found in shares:
            if least is not None and found is not None:
                parts.append((f"{name} {100 * found:.0f} % of {100 * least:.0f} %", found >= least))
        if self.rate is not None:
            parts.append((f"{rate:.0f} GMAC/s of {self.rate:.0f}", rate >= self.rate))
        for library, least in self.faster.items():
            if library in faster:
                found = faster[library]
                parts.append((f"{library} {found:.2f} x of {least:.2f} x", found >= least))
        return parts


TARGETS = (
    Target("MXFP4", "A", 1, read=0.85, faster={"ggml": 1.6}),
    Target("MXFP4", "A", 4, faster={"ggml": 1.79}),
    Target("MXFP4", "A", 16, faster={"ggml": 2.81}),
    Target("MXFP4", "A", 64, peak=0.64),
    Target("MXFP4", "A", 1024, peak=0.81),
    Target("BF16", "A", 1, read=0.92),
    Target("BF16", "A", 1024, peak=0.88),
    *(Target("MXFP4", shape, 1, read=0.82) for shape in "BCD"),
    *(Target("MXFP4", shape, 1024, peak=0.75) for shape in "BCD"),
)
"""Peaks are 150, 190, 205 and 175 of 234 * 10^9 multiply-accumulates a second, the peak of two
Zen 4 cores at 3.66 GHz."""


MANY, NARROW_MANY = 1024, 128
"""Tokens of a format's second point; on AVX2, where peers take ten seconds for 1024, fewer."""


def _format(
    method: str, decode: float | None, rate: float | None, fast: bool = False
) -> list[Target]:
    """One token and 1024 of a format on shape A; `fast`: the latter with int8 activations."""
    many = method + (INT8_ACTIVATIONS if fast else "")
    return [Target(method, "A", 1, decode=decode), Target(many, "A", MANY, rate=rate)]


FORMAT_TARGETS = (
    *_format("FP8", 0.82, 190),
    *_format("FP8_PERCHANNEL", 0.85, 200),
    *_format("RAWINT4", 0.75, 190),
    *_format("AMXINT8", 0.85, 250, fast=True),
    *_format("AMXINT4", 0.75, 250, fast=True),
    *_format("Q4_K", 0.65, 190),
    *_format("NVFP4", 0.75, 180),
    *_format("MXFP8", 0.82, 180),
    *_format("GPTQ_INT4", 0.75, 180),
    *(t for method in (
        "MXFP4", "BF16", "AWQ", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K",
        "Q6_K", "IQ4_NL", "IQ4_XS",
    ) for t in _format(method, None, None)),
)  # fmt: skip
"""Every format; rates are of two Zen 4 cores. Those without a figure are only compared."""


NARROW_TARGETS = tuple(
    Target(
        t.method, t.shape, tokens,
        faster={"kt-kernel": 1.3, "ggml": 1.0},
    )
    for t in FORMAT_TARGETS if t.tokens == 1 for tokens in (1, NARROW_MANY)
)  # fmt: skip
"""Every format on AVX2, with activations of 16 bits."""


def target_for(method: str, shape: str, tokens: int, narrow: bool = False) -> Target | None:
    """The target of a point, or None; `narrow`: on AVX2."""
    wanted = (method, shape, tokens)
    every = NARROW_TARGETS if narrow else (*TARGETS, *FORMAT_TARGETS)
    return next((t for t in every if (t.method, t.shape, t.tokens) == wanted), None)


VERDICTS = (
    text("target", "{layer}"),
    number("tokens", "tokens"),
    text("measured of wanted", "{measured}"),
    Column("", lambda v: "met" if v["met"] else "**missed**"),
)
FORMAT_VERDICTS = (VERDICTS[0], number("threads", "threads"), *VERDICTS[1:])


def verdicts(points: Iterable[Point], narrow: bool = False) -> list[dict[str, Any]]:
    """Rows of `VERDICTS`: each part of every target that was measured, with the most threads of any
    point; shares of `decode` with any number of threads. `narrow`: on AVX2."""
    groups = by_point(points)
    most = max((threads for *_, threads in groups), default=0)
    found = []
    for (method, shape, tokens, threads), libraries in groups.items():
        target = target_for(method, shape, tokens, narrow)
        ours = libraries.get(OURS)
        if target is None or ours is None:
            continue
        if threads != most:
            target = Target(method, shape, tokens, decode=target.decode)
        faster = {name: p["ours_is_faster"] for name, p in libraries.items() if name != OURS}
        parts = target.verdicts(
            read_share(ours), peak_share(ours), faster, decode_share(ours),
            ours["macs"] / ours["ms"] / 1e6,
        )  # fmt: skip
        at = {"layer": f"{method} {shape}", "tokens": tokens, "threads": threads}
        found += [{**at, "measured": measured, "met": met} for measured, met in parts]
    return found
