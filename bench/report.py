"""Receipts -> `docs/results/<date>-<processor>.json`, pictures, and `docs/results/README.md`.

    python bench/report.py RECEIPT.json ...

Receipts are what the other benchmarks write with --json; several of one benchmark are joined. A
benchmark that was stored on the same day and processor and is not among them stays. The page shows
every stored file, newest first. `roofline.svg`, which README shows, is drawn from the newest file
with a measured layer, and README's table of whole models is written from the newest file that has
some. Pictures need matplotlib: `pip install "hybrid-moe[bench]"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comparison
import front_page
import tables
from comparison import OUR_ERROR, by_point
from gpu_check import report as gpu_tables
from gpu_check.running import Outcome
from tables import Column, markdown, number, text

from hybrid_moe.planning.receipt import write_receipt

Bench = dict[str, Any]

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

README = RESULTS.parent.parent / "README.md"

ROOFLINE = "roofline.svg"

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


def ceilings(bench: Bench) -> Iterator[str]:
    """Read bandwidths and peaks."""
    yield "### Ceilings\n\n`hybrid-moe bench ceilings`\n"
    yield markdown(tables.READ_CEILINGS, bench["reads"])
    columns = (
        text("tier, op", "{tier}, {op}"),
        number("1 thread, GMAC/s", "one_thread", 1),
        number(f"{bench['threads']} threads", "all_threads", 1),
        Column("of a format", lambda p: ", ".join(f"{n} {r:.1f}" for n, r in p["formats"].items())),
    )
    yield markdown(columns, bench["peaks"])


def end_to_end(bench: Bench) -> Iterator[str]:
    """Whole models, ours beside other engines."""
    points = bench["points"]
    yield "### Whole models\n\n`python bench/end_to_end.py --peers llama.cpp`\n"
    engines = dict.fromkeys(p["label"] for p in points)
    yield (
        'Random weights in published dimensions and layouts, MXFP4 experts; "linear" is the '
        "format of all other matrices. Engines take turns, each in a fresh process that loads the "
        f"model, with {points[0]['threads']} threads; figures are medians over "
        f'{len(points[0]["decode"])} rounds, "we are" that of the rounds\' ratios. The roofline is '
        "the read bandwidth around the answer over the bytes that a token reads: its experts, "
        "linear layers, routers, norms and the KV cache, each once. The peak is that of the "
        "instructions that the formats of a prompt's products are given. Memory is the most that "
        'the process has held so far, beside what `hybrid-moe plan` says of it. "Filled": the '
        f"cache has random keys and values. {'; '.join(engines)}.\n"
    )
    yield markdown(tables.END_TO_END, points)


def dense(bench: Bench) -> Iterator[str]:
    """Linear layers beside torch's."""
    yield "### Linear layers\n\n`python bench/dense.py`\n"
    yield (
        "Of gpt-oss-20b, each call with other weights than the last ones. A job without work takes "
        f"{bench['empty']['median_us']:.1f} µs.\n"
    )
    yield markdown(tables.DENSE, bench["points"])


def moe_layer(bench: Bench) -> Iterator[str]:
    """Our layer beside both ceilings."""
    yield "### One MoE layer\n\n`python bench/moe_layer.py`\n"
    yield markdown(tables.MOE_LAYER, bench["points"])


def peers(bench: Bench) -> Iterator[str]:
    """Ours and theirs, with ratios; targets; errors."""
    points = bench["points"]
    yield "### Beside other libraries\n\n`python bench/peers.py --targets`\n"
    yield (
        "Libraries take turns in processes of their own, with the same number of threads; in "
        "brackets the median over rounds of their time over ours: below 1 we lose. kt-kernel runs "
        "only where a core is spare, since its queue thread busy-waits through a call. GB/s count "
        "the format's own bits per weight, whatever a library keeps. Missing figures took too "
        f"long. {'; '.join(comparison.labels(points))}.\n"
    )
    yield markdown(comparison.COLUMNS, comparison.side_by_side(points))
    lost = [
        f"{p['label']} at {method} {shape}, {tokens} tokens, {threads} threads "
        f"({p['ours_is_faster']:.2f})"
        for (method, shape, tokens, threads), libraries in by_point(points).items()
        for p in libraries.values()
        if p["ours_is_faster"] is not None and p["ours_is_faster"] < 1
    ]
    yield f"Faster than we are: {'; '.join(lost) if lost else 'none of these'}.\n"
    if wanted := comparison.verdicts(points):
        yield markdown(comparison.VERDICTS, wanted)
    if bench["errors"]:
        yield (
            "Error ‖y − reference‖ / ‖reference‖ against float64 on the same dequantized weights "
            "(hidden 1024, intermediate 512, top-4); rounding the exact result to BF16 alone gives "
            f"0.0017; ggml returns float32. Wanted of ours: at most {OUR_ERROR:.4f}.\n"
        )
        yield markdown(tables.ERRORS, bench["errors"])


def formats_avx2(bench: Bench) -> Iterator[str]:
    """Every format on AVX2 alone, beside its peers, which have no more either."""
    return formats(bench, tier="avx2")


def formats(bench: Bench, tier: str | None = None) -> Iterator[str]:
    """Every format beside its peers, and its bars; `tier`: on another than the best."""
    points = bench["points"]
    where, option = (f" on {tier}", f" TIER={tier}") if tier else ("", "")
    yield f"### Every format{where}\n\n`make bench-formats{option}`\n"
    yield (
        'As beside other libraries, one table for all formats. "Decodes" is the rate at which the '
        "tier's instructions decode the format for one token, counted from their assembly; the "
        "share of both is of the lower of that and what could be read. A method that ggml does not "
        "have stands beside its type of as many bits, Q4_0 or Q8_0. "
        f"{'; '.join(comparison.labels(points))}.\n"
    )
    yield markdown(comparison.FORMAT_COLUMNS, comparison.side_by_side(points))
    if wanted := comparison.verdicts(points, narrow=tier == "avx2"):
        yield markdown(comparison.FORMAT_VERDICTS, wanted)
    if bench["errors"]:
        yield markdown(tables.ERRORS, bench["errors"])


def accuracy(bench: Bench) -> Iterator[str]:
    """Errors of every format."""
    yield "### Errors of every format\n\n`python bench/accuracy.py`, see docs/formats.md\n"
    yield markdown(tables.ACCURACY, bench["points"])


def pool(bench: Bench) -> Iterator[str]:
    """Fork-join."""
    yield "### Fork-join of an empty job\n\n`python bench/pool.py`\n"
    yield (
        "Microseconds, in compiled code. \"Handed over\": another thread runs the job; its ceiling "
        "is a bare signal between two threads, or a bare futex wake and its answer. An empty job "
        f"writes zeros: 256 bytes for each thread, on layer A a row. {tables.POOL_WANTED}\n"
    )  # fmt: skip
    yield markdown(tables.POOL, bench["points"])


def load(bench: Bench) -> Iterator[str]:
    """Loading a checkpoint."""
    points = bench["points"]
    packed = points[0]["packed_bytes"] / 1e9
    yield "### Loading\n\n`python bench/load.py`\n"
    yield (
        f"{packed:.2f} GB of MXFP4 experts (shape A), {bench['threads']} threads, each round in a "
        'fresh process. "System hands out" is how fast another process had just been given '
        'anonymous memory, the ceiling of a first load; "again" loads once more into the memory '
        "just given back, which leaves reading and packing. Both read the page cache. The disk is "
        "read in order by as many threads, its pages dropped before; what is loaded from it, or "
        "from a packed cache on it, likewise.\n"
    )
    yield markdown(tables.LOAD, ({"round": i, **p} for i, p in enumerate(points, 1)))
    again = statistics.median(p["again_GBps"] for p in points)
    first = statistics.median(p["GBps"] for p in points)
    yield f"Medians: {first:.2f} GB/s, again {again:.2f} GB/s.\n"
    if packing := bench.get("packing"):
        listed = ", ".join(f"{p['format']} {p['GBps']:.1f}" for p in packing)
        yield f"Packing alone, one thread, rows in memory, GB/s: {listed}.\n"


def big(bench: Bench) -> Iterator[str]:
    """A checkpoint as large as memory allows."""
    yield "### At size\n\n`make bench-big`\n"
    yield (
        f"Random weights in published dimensions, {bench['threads']} threads: written, inspected, "
        "planned, loaded from the disk in a fresh process with nothing of them in the page cache, "
        "and run, all layers of experts in turn. The disk is what plain sequential reads get just "
        "before and after. Memory is the most that the process held beyond its imports, beside "
        "what `hybrid-moe plan` says of the experts. The roofline is the read bandwidth of the "
        "same seconds over the bytes of a token's experts.\n"
    )
    yield markdown(tables.BIG, bench["points"])


def quick(bench: Bench) -> Iterator[str]:
    """What `make bench-quick` compares with."""
    yield "### Quick check\n\n`make bench-quick` compares with these.\n"
    yield markdown(tables.QUICK, bench["points"])


def steps(bench: Bench) -> Iterator[str]:
    """The tables of docs/kernels.md."""
    yield "### The decode kernel, step by step\n\n`python bench/steps.py`, see docs/kernels.md\n"
    for part in dict.fromkeys(p["part"] for p in bench["points"]):
        points = [p for p in bench["points"] if p["part"] == part]
        yield markdown(tables.STEPS, points)


def gpu_check(bench: Bench) -> Iterator[str]:
    """The GPU's part, as `make gpu-check` measures it."""
    yield f"### On a GPU: {bench['gpu'] or 'none was at hand'}\n\n`make gpu-check`\n"
    outcomes = [Outcome(**step) for step in bench["steps"]]
    yield gpu_tables.table(
        ("what", "bar", "measured"), gpu_tables.summary(outcomes, bench["points"])
    )
    yield from gpu_tables.sections(bench["points"], "####")


SECTIONS: Mapping[str, Callable[[Bench], Iterator[str]]] = MappingProxyType(
    {
        s.__name__: s
        for s in (
            end_to_end,
            ceilings,
            moe_layer,
            dense,
            gpu_check,
            peers,
            formats,
            formats_avx2,
            accuracy,
            pool,
            load,
            big,
            steps,
            quick,
        )
    }
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


def store(document: dict[str, Any], folder: Path) -> Path:
    """Write a joined document; benchmarks of the same day and processor that it lacks stay."""
    path = folder / f"{document['date']}-{slug(document['processor'])}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        document = {**document, "benches": stored["benches"] | document["benches"]}
    write_receipt(path, document)
    return path


def render(folder: Path) -> list[Path]:
    """Draw and write the page of all stored documents; returns the files that were written."""
    can_draw = importlib.util.find_spec("matplotlib") is not None
    shown = []
    written = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        document = json.loads(path.read_text())
        pictures: dict[str, str] = {}
        if can_draw:
            from plots import draw

            pictures = draw(document, folder, path.stem)
        shown.append((document, pictures))
        written += [folder / name for name in pictures.values()]
        if pictures and folder / ROOFLINE not in written:
            from plots import draw_roofline

            draw_roofline(document, folder / ROOFLINE)
            written.append(folder / ROOFLINE)
    page_path = folder / "README.md"
    page_path.write_text(page(shown))
    if not can_draw:
        print('no pictures: pip install "hybrid-moe[bench]"')
    return [*written, page_path]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("receipts", nargs="*", help="receipts of one machine to join and store")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.receipts:
        receipts = [json.loads(Path(name).read_text()) for name in args.receipts]
        print(store(join(receipts), RESULTS))
    for path in [*render(RESULTS), *front_page.write(README, RESULTS)]:
        print(path)


if __name__ == "__main__":
    main()
