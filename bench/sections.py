"""Stored results as Markdown: one section for each benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from columns import COLUMNS
from comparison import HEADER, by_point, comparison, labels, verdicts
from targets import FORK_JOIN_US, OUR_ERROR

Bench = dict[str, Any]

HEAD = """# Measured results

Written by `bench/report.py` from the receipts beside this file; every figure can be measured again
with the command above its table ([bench/README.md](../../bench/README.md) says what each one does).
Figures are medians. Each stands beside its ceiling: the read bandwidth measured with as many
threads just before and after the point ("read now": on shared hosts it changes from minute to
minute), and the peak multiply-accumulates per second of the instruction that the ISA tier gives the
format, with decoding, scales and memory left out (`hybrid-moe bench ceilings`). Weights are random,
every call routes every token anew, and the layer is far larger than the caches. Shapes (hidden,
intermediate, experts in memory, top-k): A 4096, 2048, 64, 6; B 2048, 768, 128, 8; C 2880, 2880, 32,
4 with biases and clamped SwiGLU; D 7168, 2048, 24, 8. More than 100 % of the read bandwidth means
that it was higher during the point than around it.
"""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, right-aligned but for its first column."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ceilings(bench: Bench) -> Iterator[str]:
    """Read bandwidths and peaks."""
    yield "### Ceilings\n\n`hybrid-moe bench ceilings`\n"
    yield markdown(
        ("who reads", "threads", "in order, GB/s", "random 4 MiB blocks, GB/s"),
        (
            (r["where"], str(r["threads"]), f"{r['in_order']:.1f}", f"{r['at_random']:.1f}")
            for r in bench["reads"]
        ),
    )
    yield markdown(
        ("tier, op", "1 thread, GMAC/s", f"{bench['threads']} threads", "of a format"),
        (
            (
                f"{p['tier']}, {p['op']}",
                f"{p['one_thread']:.1f}",
                f"{p['all_threads']:.1f}",
                ", ".join(f"{name} {rate:.1f}" for name, rate in p["formats"].items()),
            )
            for p in bench["peaks"]
        ),
    )


def moe_layer(bench: Bench) -> Iterator[str]:
    """Our layer beside both ceilings."""
    yield "### One MoE layer\n\n`python bench/moe_layer.py`\n"
    yield markdown(
        ("method, shape, threads, tier", "tokens", "ms", "GB/s of weights", "read now", "% of read",
         "GMAC/s", "peak", "% of peak", "tokens/s"),
        (
            (
                f"{p['method']} {p['shape']}, {p['threads']} threads, {p['isa']}",
                str(p["tokens"]),
                f"{p['ms']:.2f}",
                f"{p['weight_bandwidth']:.2f}",
                f"{p['read_bandwidth']:.1f}",
                f"{100 * p['weight_bandwidth'] / p['read_bandwidth']:.0f}",
                f"{p['rate']:.1f}",
                f"{p['rate_ceiling']:.0f}",
                f"{100 * p['rate'] / p['rate_ceiling']:.0f}",
                f"{p['tokens_per_s']:.1f}",
            )
            for p in bench["points"]
        ),
    )  # fmt: skip


def peers(bench: Bench) -> Iterator[str]:
    """Ours and theirs, with ratios; targets; errors."""
    points = bench["points"]
    yield "### Beside other libraries\n\n`python bench/peers.py --targets`\n"
    yield (
        "Libraries take turns in processes of their own, with the same number of threads; in "
        "brackets the median over rounds of their time over ours: below 1 we lose. kt-kernel runs "
        "only where a core is spare, since its queue thread busy-waits through a call. GB/s count "
        "the format's own bits per weight, whatever a library keeps. Missing figures took too "
        f"long. {'; '.join(labels(points))}.\n"
    )
    yield markdown(HEADER, comparison(points))
    lost = [
        f"{p['label']} at {method} {shape}, {tokens} tokens, {threads} threads "
        f"({p['ours_is_faster']:.2f})"
        for (method, shape, tokens, threads), libraries in by_point(points).items()
        for p in libraries.values()
        if p["ours_is_faster"] is not None and p["ours_is_faster"] < 1
    ]
    yield f"Faster than we are: {'; '.join(lost) if lost else 'none of these'}.\n"
    wanted = verdicts(points)
    if wanted:
        yield markdown(
            ("target", "tokens", "measured of wanted", ""),
            ((*row, "met" if met else "**missed**") for *row, met in wanted),
        )
    if bench["errors"]:
        yield (
            "Error ‖y − reference‖ / ‖reference‖ against float64 on the same dequantized weights "
            "(hidden 1024, intermediate 512, top-4); rounding the exact result to BF16 alone gives "
            f"0.0017; ggml returns float32. Wanted of ours: at most {OUR_ERROR:.4f}.\n"
        )
        yield markdown(
            ("library", "method", "inputs N(0, 1)", "8 channels × 40"),
            (
                (e["label"], e["method"], f"{e['normal']:.4f}", f"{e['outliers']:.4f}")
                for e in bench["errors"]
            ),
        )


def pool(bench: Bench) -> Iterator[str]:
    """Fork-join."""
    yield "### Fork-join of an empty job\n\n`python bench/pool.py`\n"
    yield (
        "Microseconds, in compiled code. \"Handed over\": another thread runs the job; its ceiling "
        "is a bare signal between two threads, or a bare futex wake and its answer. On layer A a "
        "row is encoded and a row of zeros written. Wanted of the tiny layer with two threads: at "
        f"most {FORK_JOIN_US['hot']:g} hot and {FORK_JOIN_US['asleep']:g} from sleep.\n"
    )  # fmt: skip
    yield markdown(
        ("layer, state, caller", "threads", "median", "p99", "bare signal", "Python adds"),
        (
            (
                f"{p['job']}, {p['state']}, {p['caller']}",
                str(p["threads"]),
                f"{p['median_us']:.2f}",
                f"{p['p99_us']:.2f}",
                "" if p["signal_us"] is None else f"{p['signal_us']:.2f}",
                "" if p["python_us"] is None else f"{p['python_us']:.1f}",
            )
            for p in bench["points"]
        ),
    )


def load(bench: Bench) -> Iterator[str]:
    """Loading a checkpoint."""
    points = bench["points"]
    packed = points[0]["packed_bytes"] / 1e9
    yield "### Loading from the page cache\n\n`python bench/load.py`\n"
    yield (
        f"{packed:.2f} GB of MXFP4 experts (shape A), {bench['threads']} threads, each round in a "
        'fresh process. "System hands out" is how fast another process had just been given '
        'anonymous memory, the ceiling of a first load; "again" loads once more into the memory '
        "just given back, which leaves reading and packing.\n"
    )
    yield markdown(
        ("round", "system hands out, GB/s", "load, GB/s", "again, GB/s", "peak memory / packed"),
        (
            (
                str(number),
                f"{p['first_touch_GBps']:.2f}",
                f"{p['GBps']:.2f}",
                f"{p['again_GBps']:.2f}",
                f"{p['peak_over_packed']:.3f}",
            )
            for number, p in enumerate(points, 1)
        ),
    )
    again = statistics.median(p["again_GBps"] for p in points)
    first = statistics.median(p["GBps"] for p in points)
    yield f"Medians: {first:.2f} GB/s, again {again:.2f} GB/s.\n"


def quick(bench: Bench) -> Iterator[str]:
    """What `make bench-quick` compares with."""
    yield "### Quick check\n\n`make bench-quick` compares with these.\n"
    yield markdown(
        ("figure", "value"),
        ((p["name"], f"{p['value']:.3g} {p['unit']}") for p in bench["points"]),
    )


def steps(bench: Bench) -> Iterator[str]:
    """The tables of docs/kernels.md."""
    yield "### The decode kernel, step by step\n\n`python bench/steps.py`, see docs/kernels.md\n"
    for part in dict.fromkeys(p["part"] for p in bench["points"]):
        points = [p for p in bench["points"] if p["part"] == part]
        keys = [key for key in COLUMNS if key in points[0]]
        yield markdown(
            tuple(COLUMNS[key].heading for key in keys),
            (tuple(COLUMNS[key].text(p[key]) for key in keys) for p in points),
        )


SECTIONS: Mapping[str, Callable[[Bench], Iterator[str]]] = MappingProxyType(
    {s.__name__: s for s in (ceilings, moe_layer, peers, pool, load, steps, quick)}
)
"""Benchmark, as its receipt names it -> its section, in the order of the page."""


def page(documents: Iterable[tuple[dict[str, Any], Mapping[str, str]]]) -> str:
    """The whole page.

    Args:
        documents: stored results, each with its plots: benchmark -> name of a picture beside it.
    """
    parts = [HEAD]
    for document, pictures in documents:
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        parts.append(f"## {document['processor']}, {document['date']}\n\n{versions}.\n")
        for name, section in SECTIONS.items():
            if name in document["benches"]:
                parts += section(document["benches"][name])
                if name in pictures:
                    parts.append(f"![{name}]({pictures[name]})\n")
    return "\n".join(parts)
