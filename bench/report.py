"""Receipts -> `docs/results/<date>-<processor>.json` and the tables in `docs/results/README.md`.

    python bench/report.py RECEIPT.json ...

Receipts are what the other benchmarks write with --json; several of one benchmark are joined. The
tables show every file in the directory, newest first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import write_receipt

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

HEAD = """# Measured results

Written by `bench/report.py` from the receipts beside this file; every figure can be measured again
with the command above its table. Figures are medians. Each stands beside its ceiling: the read
bandwidth measured with as many threads just before and after the point ("read now": on shared hosts
it changes from minute to minute), and the peak multiply-accumulates per second of the dot product
that the ISA tier gives the format, with decoding, scales and memory left out
(`bench/ceilings.py`). Weights are random, every call routes every token anew, and the layer is far
larger than the caches. Shapes (hidden, intermediate, experts in memory, top-k): A 4096, 2048, 64,
6; B 2048, 768, 128, 8; C 2880, 2880, 32, 4 with biases and clamped SwiGLU; D 7168, 2048, 24, 8.
More than 100 % of the read bandwidth means that it was higher during the point than around it.
"""


def slug(text: str) -> str:
    """A file name's part."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def join(receipts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document: facts of the machine, then each benchmark with the points of its receipts.

    Raises:
        SystemExit: the receipts are of different processors.
    """
    processors = {r["processor"] for r in receipts}
    if len(processors) != 1:
        raise SystemExit(f"receipts of different processors: {', '.join(sorted(processors))}")
    document: dict[str, Any] = {
        "date": max(r["date"] for r in receipts),
        "processor": processors.pop(),
        "versions": receipts[-1]["versions"],
        "benches": {},
    }
    shared = {"bench", "date", "processor", "versions"}
    for r in receipts:
        own = {key: value for key, value in r.items() if key not in shared}
        bench = document["benches"].setdefault(r["bench"], {})
        for key, value in own.items():
            if isinstance(value, list) and key in bench:
                bench[key] = bench[key] + value
            elif isinstance(value, dict) and key in bench:
                bench[key] = bench[key] | value
            else:
                bench[key] = value
    return document


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def moe_layer(bench: dict[str, Any]) -> Iterator[str]:
    yield "### One MoE layer\n\n`python bench/moe_layer.py`\n"
    points = bench["points"]
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
            for p in points
        ),
    )  # fmt: skip


def peers(bench: dict[str, Any]) -> Iterator[str]:
    yield "### Beside other libraries\n"
    yield "`python bench/peers.py --kt-python PYTHON --ggml-lib DIRECTORY`\n"
    yield (
        "Libraries take turns in processes of their own, with the same number of threads. "
        "kt-kernel gets a core to spare, since its queue thread busy-waits through a call. The "
        "last column is the median over rounds of their time over ours: below 1 (bold) we lose. "
        "GB/s count the format's own bits per weight, whatever a library keeps. Missing rows took "
        "too long.\n"
    )
    yield markdown(
        ("library", "threads", "method", "shape", "tokens", "ms", "GB/s of weights", "read now",
         "GMAC/s", "our peak", "ours is faster by"),
        (
            (
                p["label"],
                f"{p['threads']} (+{p['spare_cores']} spare)",
                p["method"],
                p["shape"],
                str(p["tokens"]),
                f"{p['ms']:.2f}",
                f"{p['weight_bytes'] / p['ms'] / 1e6:.2f}",
                f"{p['read_bandwidth']:.1f}",
                f"{p['macs'] / p['ms'] / 1e6:.1f}",
                f"{p['our_ceiling'] / 1e9:.0f}",
                "" if p["library"] == "ours" else _ratio(p["ours_is_faster"]),
            )
            for p in bench["points"]
        ),
    )  # fmt: skip
    lost = [
        f"{p['label']} at {p['method']} {p['shape']}, {p['tokens']} tokens "
        f"({p['ours_is_faster']:.2f})"
        for p in bench["points"]
        if p["ours_is_faster"] is not None and p["ours_is_faster"] < 1
    ]
    yield f"Faster than we are: {'; '.join(lost) if lost else 'none of these'}.\n"
    if bench["errors"]:
        yield (
            "Error ‖y − reference‖ / ‖reference‖ against float64 on the same dequantized weights "
            "(hidden 1024, intermediate 512, top-4); rounding the exact result to BF16 alone gives "
            "0.0017; ggml returns float32.\n"
        )
        yield markdown(
            ("library", "method", "inputs N(0, 1)", "8 channels × 40"),
            (
                (e["label"], e["method"], f"{e['normal']:.4f}", f"{e['outliers']:.4f}")
                for e in bench["errors"]
            ),
        )


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def load(bench: dict[str, Any]) -> Iterator[str]:
    points = bench["points"]
    packed = points[0]["packed_bytes"] / 1e9
    yield "### Loading from the page cache\n\n`python bench/load.py`\n"
    yield (
        f"{packed:.2f} GB of MXFP4 experts (shape A), {bench['threads']} threads, each round in a "
        'fresh process. "System hands out" is how fast another process had just been given '
        'anonymous memory; "again" loads once more into the memory just given back, which leaves '
        "reading and packing.\n"
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


SECTIONS = {"moe_layer": moe_layer, "peers": peers, "load": load}


def render(documents: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for document in documents:
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        parts.append(f"## {document['processor']}, {document['date']}\n\n{versions}.\n")
        for name, section in SECTIONS.items():
            if name in document["benches"]:
                parts += section(document["benches"][name])
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("receipts", nargs="*", help="receipts of one machine to join and store")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.receipts:
        document = join([json.loads(Path(name).read_text()) for name in args.receipts])
        name = f"{document['date']}-{slug(document['processor'])}.json"
        write_receipt(str(RESULTS / name), document)
    stored = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"), reverse=True)]
    (RESULTS / "README.md").write_text(render(stored))


if __name__ == "__main__":
    main()
