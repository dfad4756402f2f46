"""The results as tables: a page, a section of `docs/results`, and a short table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .running import Outcome

Point = Mapping[str, Any]

NOT_MEASURED = "not measured"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] + ["--:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: float | None, form: str = "{:.1f}", factor: float = 1.0) -> str:
    """A figure, or that there is none."""
    return NOT_MEASURED if value is None else form.format(value * factor)


def of(points: Sequence[Point], bench: str, **fields: Any) -> list[Point]:
    """The points of a benchmark with these fields."""
    wanted = {"bench": bench, **fields}
    return [p for p in points if all(p.get(key) == value for key, value in wanted.items())]


def outcomes_table(outcomes: Sequence[Outcome]) -> str:
    """Steps."""
    return table(
        ("step", "result", "s", "what it says"),
        ([o.name, o.state, f"{o.seconds:.0f}", o.reason.replace("|", "/")] for o in outcomes),
    )


def page(environment: Mapping[str, Any], outcomes: Sequence[Outcome], points: list[Point]) -> str:
    """Everything, with the short table last."""
    gpu = environment["gpu"].get("name", "no GPU")
    parts = [f"# GPU check: {gpu}\n", f"Kernels: {environment['kernels']['reason']}.\n"]
    parts.append(outcomes_table(outcomes))
    parts += sections(points)
    for outcome in outcomes:
        if outcome.state in ("failed", "too slow"):
            parts.append(f"## {outcome.name}: {outcome.state}\n\n```text\n{outcome.tail}\n```\n")
    parts.append("## In short\n")
    parts.append(table(("what", "bar", "measured"), summary(outcomes, points)))
    return "\n".join(parts)


def sections(points: list[Point], level: str = "##") -> Iterator[str]:
    """A table of each benchmark; `level` begins their headings."""
    if found := of(points, "ceilings"):
        yield f"{level} Ceilings\n"
        rows = [(p["name"], shown(p["rate"], "{:.0f}", 1e-9), f"10^9 {p['unit']}") for p in found]
        yield table(("what", "rate", "unit"), rows)
    if found := of(points, "kernels"):
        yield f"{level} Kernels\n"
        yield (
            "Microseconds in a CUDA graph whose calls use other experts one after another. The "
            "ceiling is the longer of two times: bytes at the rate of a copy, products at the rate "
            "of `mma.sync`.\n"
        )
        rows = [
            (
                f"{p['model']} {p['format']}",
                str(p["tokens"]),
                p["kernel"],
                shown(p["us"]),
                p["ceiling"] or "",
                "" if p["share"] is None else f"{100 * p['share']:.0f}",
            )
            for p in found
        ]
        yield table(("layer", "tokens", "kernel", "µs", "ceiling", "% of it"), rows)
    if found := of(points, "hybrid"):
        yield f"{level} Hybrid layer\n"
        rows = [
            (
                str(p["tokens"]),
                *(shown(p[key]) for key in ("us", "cpu_us", "gpu_us")),
                shown(p["ratio"], "{:.2f}"),
            )
            for p in found
        ]
        yield table(("tokens", "whole, µs", "CPU's part", "GPU's part", "whole / longer"), rows)
    for p in of(points, "moves"):
        yield f"{level} Moving an expert\n"
        rates = [(name, shown(p[key], "{:.1f} GB/s", 1e-9)) for name, key in MOVES]
        yield table(("what", "rate"), [*rates, ("issuing it", shown(p["issue_us"], "{:.0f} µs"))])
    for p in of(points, "streamed"):
        yield f"{level} Experts that travel, {p['tokens']} tokens\n"
        rows = [
            (f"all {p['layers']} layers, {p['tokens']} tokens, all on the CPU", shown(p["cpu_ms"])),
            ("the same, experts sent to the GPU meanwhile", shown(p["ms"])),
            ("of each layer sent, GB", shown(p["sent_bytes"], "{:.3f}", 1e-9)),
        ]
        yield table(("what", "ms"), rows)


MOVES = (
    ("promotion, until it is there", "rate"),
    ("a copy from pinned memory", "pinned_rate"),
    ("a copy from pageable memory", "pageable_rate"),
)


def summary(outcomes: Sequence[Outcome], points: list[Point]) -> Iterator[tuple[str, str, str]]:
    """Bars and what was measured: the short table."""
    states = [o.state for o in outcomes]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    yield "steps", "all passed", counts
    for name, unit, factor in (("copy", "GB/s", 1e-9), ("mma.sync", "TFLOP/s", 1e-12)):
        rate = next((p["rate"] for p in of(points, "ceilings", name=name)), None)
        yield f"ceiling: {name}", "", shown(rate, "{:.0f} " + unit, factor)
    decode = [
        p
        for p in of(points, "kernels", format="MXFP4")
        if p["kernel"] in ("gate_up", "down") and p["tokens"] <= 8
    ]
    yield _least("decode, 1 to 8 tokens, MXFP4", "≥ 60 % of copy", decode)
    prefill = [
        p
        for p in of(points, "kernels", format="MXFP4", tokens=4096)
        if p["kernel"] in ("gate_up", "down")
    ]
    yield _least("prefill, 4096 tokens, MXFP4", "≥ 50 % of mma.sync", prefill)
    for what, bar, chosen in (
        ("decode beside Triton", "faster", lambda p: p["tokens"] <= 8),
        ("prefill beside Triton", "≥ 1.0 ×", lambda p: p["tokens"] == 4096),
    ):
        yield what, bar, _beside(of(points, "kernels", format="MXFP4"), "triton", chosen)
        yield (
            what.replace("Triton", "cuBLAS"),
            "",
            _beside(of(points, "kernels", format="MXFP4"), "torch", chosen),
        )
    ratios = [p["ratio"] for p in of(points, "hybrid") if p["ratio"] is not None]
    worst = max(ratios, default=None)
    yield "hybrid layer / longer half", "≤ 1.1", shown(worst, "{:.2f} at most")
    launches = next(iter(of(points, "launches")), {})
    yield "four kernels without work, graph", "", shown(launches.get("graph_us"), "{:.1f} µs")
    yield "the same from Python", "", shown(launches.get("host_us"), "{:.1f} µs")
    streamed = next(iter(of(points, "streamed")), {})
    yield "streamed prefill beside the CPU alone", "", shown(streamed.get("faster"), "{:.2f} ×")
    moves = next(iter(of(points, "moves")), {})
    yield "promotion", "", shown(moves.get("rate"), "{:.1f} GB/s", 1e-9)


def _least(what: str, bar: str, points: Sequence[Point]) -> tuple[str, str, str]:
    shares = [p["share"] for p in points if p["share"] is not None]
    if not shares:
        return what, bar, NOT_MEASURED
    low, middle = 100 * min(shares), 100 * statistics.median(shares)
    return what, bar, f"{low:.0f} % at least, median {middle:.0f} %"


def _beside(points: Sequence[Point], other: str, chosen: Callable[[Point], bool]) -> str:
    """Their time over ours for both GEMMs: above 1 ours is faster."""
    ours: dict[tuple[str, int], float] = {}
    theirs: dict[tuple[str, int], float] = {}
    for p in points:
        if p["us"] is None or not chosen(p):
            continue
        key = p["model"], p["tokens"]
        if p["kernel"] in ("gate_up", "down"):
            ours[key] = ours.get(key, 0.0) + p["us"]
        elif p["kernel"].startswith(other):
            theirs[key] = p["us"]
    ratios = [theirs[key] / ours[key] for key in ours if key in theirs]
    if not ratios:
        return NOT_MEASURED
    return f"{min(ratios):.2f} × at least, median {statistics.median(ratios):.2f} ×"
