"""Writes docs/formats.md, and the errors of every format in docs/numerics.md.

    python bench/formats_table.py

What a format is comes from its row of `formats.table`, and from the tables of the loaders, of the
kernels and of the GPU's objects. What was measured comes from the newest receipts in docs/results
that have it: `accuracy` (bench/accuracy.py) and `formats` (`make bench-formats`). A test holds the
committed pages against what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comparison
import tables
from comparison import MANY, NARROW_MANY, OURS, PEERS, by_point, decode_share, read_share
from tables import Column, markdown, text
from weights import INT8_ACTIVATIONS, format_of

from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.formats.strips import PANELS, StripField, strip_layout
from hybrid_moe.formats.table import FORMATS, METHODS, Method
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.weight_codes.objects import has_object
from hybrid_moe.loaders.written import written_methods

ROOT = Path(__file__).resolve().parent.parent
PAGE, NUMERICS = ROOT / "docs" / "formats.md", ROOT / "docs" / "numerics.md"
RESULTS = ROOT / "docs" / "results"
K = 4096
"""Inputs of the rows whose sizes are shown."""

CHECKPOINTS: Mapping[str, str] = MappingProxyType(
    {
        "MXFP4": "DeepSeek-V4, gpt-oss (`*_blocks`, `*_scales`), GGUF; any other naming scheme",
        "NVFP4": "ModelOpt (`weight_scale`, `weight_scale_2`)",
        "MXFP8": "MiniMax-M3 (`weight_scale_inv` of bytes)",
        "FP8": "DeepSeek-V3 and R1, MiniMax-M2, Qwen3-FP8 (`weight_scale_inv`)",
        "FP8_PERCHANNEL": "GLM (`weight_scale` [N, 1])",
        "BF16": "all families; F16 and F32 are rounded",
        "INT8": "what `hybrid-moe convert` writes; GGUF's Q8_0",
        "RAWINT4": "Kimi-K2, compressed-tensors (`weight_packed`)",
        "GPTQ_INT4": "GPTQ, both versions (`qweight`, `qzeros`); compressed-tensors, fp16 scales",
        "AWQ": "AWQ, gemm (`qweight`, `qzeros`)",
        "AMXINT4": "from 16-bit weights or FP8 at load, or converted; kt-kernel's `blk.*` files",
        "AMXINT8": "the same",
        "MOE_INT4": "the same as AMXINT4",
        "MOE_INT8": "the same as AMXINT8",
        "LLAMAFILE": "GGUF, one file or several",
    }
)
"""Method -> what is read for it."""

HEAD = """# Weight formats

Written by `python bench/formats_table.py` from the tables that the library runs on; do not edit.

`method=` says how experts are held. None, or `"auto"`, takes every layer as its checkpoint stores
it, which may differ by layer and between gate/up and down; a name asks for one of the formats that
it stands for, and quantizes weights of 16 bits to the one that it makes. `hybrid-moe inspect` says
which layers have what, [numerics.md](numerics.md) what is computed, to the bit.

"""

FORMATS_HEAD = f"""## Formats

Bits per weight count everything that a checkpoint stores, for rows of {K} inputs; "strip" is what
memory holds over that. A strip is 64 rows, four panels of 16; codes of a group of 32 inputs follow
each other as words `[word][panel][row]`, and with them, or in front of the groups of a block, lie
its fields `[element][panel][row]` (`hybrid_moe/formats/strips.py`). Both processors read the same
bytes. "Products": how processors multiply; as integers all tiers have the same bits.

"""

SPEED_HEAD = """## Speed

Layer A (hidden 4096, intermediate 2048, 64 experts in memory, 6 a token), random experts from far
more weights than a cache holds. One token: GB/s of weights in the format's own bits, over the lower
of two ceilings of the same seconds: the read bandwidth, and the rate at which the tier's
instructions decode the format, counted from their assembly. 1024 tokens: 10^9 products added up in
a second. Under a peer's name: how many times as long it takes on the same experts and threads, so
that below 1 we lose. kt-kernel runs only where a core is spare. `make bench-formats` measures it.

"""

NARROW_HEAD = """
### With AVX2 alone

The same on a processor that has more but was used without it, by all of them: `make bench-formats
TIER=avx2`.

"""

ERRORS_HEAD = """## Errors

`python bench/accuracy.py`. Inputs: ‖y − reference‖ / ‖reference‖ of an MoE layer against float64 on
the same dequantized weights, returned in bf16; the floor is the exact result rounded once. `+int8`:
activations of 8 bits (`cpu_activation="int8"`). Weights: ‖W′ − W‖ / ‖W‖ of normal weights and what
the quantizer makes of them; of types that are only read llama.cpp's own quantizer.

"""
NOT_MEASURED = "Not measured yet.\n"
_MARKS = ("<!-- errors: bench/formats_table.py -->\n", "<!-- end of errors -->\n")


def methods_table() -> str:
    """What each method stands for."""
    written = written_methods()

    def converts(method: Method) -> str:
        return "yes" if method.name in written else ""

    columns = (
        Column("method", lambda m: f"`{m['method'].name}`"),
        Column("formats", lambda m: _formats_of(m["method"])),
        Column("made of 16-bit weights", lambda m: _made(m["method"])),
        Column("`convert` writes it", lambda m: converts(m["method"])),
        Column("checkpoints", lambda m: CHECKPOINTS[m["method"].name]),
    )
    return markdown(columns, ({"method": method} for method in METHODS.values()))


def _formats_of(method: Method) -> str:
    return ", ".join(fmt.name for fmt in method.formats)


def _made(method: Method) -> str:
    return method.made.name if method.made else ""


def _field(field: StripField) -> str:
    bits = 8 * field.itemsize
    return f"{field.name}: {field.count} of {bits} bits{' a panel' if field.shared else ''}"


def strip_text(fmt: WeightFormat) -> str:
    """A format's block in words."""
    layout = strip_layout(fmt, K)
    codes = f"{layout.words} words" + (f" + {layout.high_words} high" if layout.high_words else "")
    fields = ", ".join(map(_field, layout.fields))
    if layout.block_groups > 1:
        block = f"{fields}; {layout.block_groups} groups of {codes}"
    else:
        block = codes + (f"; {fields}" if fields else "")
    rows = ", ".join(map(_field, layout.row_fields))
    return f"of the strip {rows}; blocks of {block}" if rows else f"blocks of {block}"


def strip_overhead(fmt: WeightFormat) -> float:
    """Bytes of a strip over those that a checkpoint stores for its rows."""
    rows = 16 * PANELS
    # rows that share scales have as many of them in a strip as in whole blocks of rows
    stored = fmt.nbytes(rows * fmt.scale_rows, K) / fmt.scale_rows
    return strip_layout(fmt, K).nbytes / stored


def _products(fmt: WeightFormat) -> str:
    if not has_kernels(fmt):
        return "none yet"
    return "bf16 pairs" if fmt.code.name in ("bf16", "e4m3") else "integers"


def _gpu(fmt: WeightFormat) -> str:
    if not has_object(fmt):
        return "no: no object reads its strips"
    return "yes, two loads a k-step" if 0 < fmt.group < 32 else "yes"


def formats_table() -> str:
    """Every row of `FORMATS`."""
    columns = (
        Column("format", lambda p: f"`{p['fmt'].name}`"),
        Column("codes", lambda p: p["fmt"].code.name),
        Column("scales", lambda p: _scale_text(p["fmt"])),
        Column("bits per weight", lambda p: f"{p['fmt'].bits_per_weight:.3f}"),
        Column("strip", lambda p: f"{strip_overhead(p['fmt']):.3f}"),
        Column("layout in the strip", lambda p: strip_text(p["fmt"])),
        Column("products", lambda p: _products(p["fmt"])),
        Column("GPU object", lambda p: _gpu(p["fmt"])),
    )
    return markdown(columns, ({"fmt": fmt} for fmt in FORMATS.values()))


def _scale_text(fmt: WeightFormat) -> str:
    if fmt.scale is None:
        return ""
    group = f"{fmt.scale_rows} x {fmt.group}" if fmt.scale_rows > 1 else fmt.group or "row"
    zeros = {"minima": "zero points"} if "zero" in fmt.scaling else {}
    more = [zeros.get(p.name, p.name) for p in fmt.more if p.name != "high"]
    return f"{fmt.scale.name} / {group}" + (f", {', '.join(more)}" if more else "")


def newest(bench: str, folder: Path) -> dict[str, Any] | None:
    """The newest stored document that has a benchmark."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        document: dict[str, Any] = json.loads(path.read_text())
        if bench in document["benches"]:
            return document
    return None


def _where(document: Mapping[str, Any]) -> str:
    return f"{document['processor']}, {document['date']}"


def speed(folder: Path) -> Iterator[str]:
    """Of every measured method, beside its peers."""
    yield SPEED_HEAD
    document = newest("formats", folder)
    if document is None:
        yield NOT_MEASURED
        return
    points = document["benches"]["formats"]["points"]
    yield from _speed_table(document, points, MANY)
    missing = [name for name in METHODS if not any(format_of_is(p, name) for p in points)]
    if missing:
        yield f"\nNot measured: {', '.join(missing)}.\n"
    if narrow := newest("formats_avx2", folder):
        yield NARROW_HEAD
        points = narrow["benches"]["formats_avx2"]["points"]
        yield from _speed_table(narrow, points, NARROW_MANY)


def _speed_table(
    document: Mapping[str, Any], points: list[dict[str, Any]], many: int
) -> Iterator[str]:
    """`many`: tokens of the second point."""
    labels = "; ".join(comparison.labels(points))
    yield f"{_where(document)}. {labels}.\n\n"
    rows = list(_speed_rows(points, many))
    columns = (
        text("method", "{method}"),
        text("threads", "{threads}"),
        text("1 token, GB/s", "{bandwidth}"),
        text("of read, GB/s", "{read}"),
        text("of decode, GB/s", "{counted}"),
        text("% of the lower", "{share}"),
        *(Column(f"{peer}", lambda r, peer=peer: r["one"].get(peer, "")) for peer in PEERS),
        text(f"{many} tokens, GMAC/s", "{rate}"),
        *(Column(f"{peer}", lambda r, peer=peer: r["many"].get(peer, "")) for peer in PEERS),
    )
    yield markdown(columns, rows)


def format_of_is(point: Mapping[str, Any], method: str) -> bool:
    """Whether a measured point is of a format that a method stands for."""
    return format_of(point["method"]) in METHODS[method].formats


def _speed_rows(points: list[dict[str, Any]], tokens: int) -> Iterator[dict[str, Any]]:
    groups = by_point(points)
    keys = dict.fromkeys((method, shape, threads) for method, shape, _, threads in groups)
    for method, shape, threads in keys:
        one = groups.get((method, shape, 1, threads), {})
        many = groups.get((method, shape, tokens, threads), {})
        mine, most = one.get(OURS), many.get(OURS)
        share = None if mine is None else decode_share(mine) or read_share(mine)
        yield {
            "method": method,
            "threads": threads,
            "bandwidth": _of(mine, lambda p: p["weight_bytes"] / p["ms"] / 1e6, 1),
            "read": _of(mine, lambda p: p["read_bandwidth"], 1),
            "counted": _of(mine, lambda p: p.get("counted_rate"), 1),
            "share": "" if share is None else f"{100 * share:.0f}",
            "rate": _of(most, lambda p: p["macs"] / p["ms"] / 1e6, 0),
            "one": {peer: _ratio(one.get(peer)) for peer in PEERS},
            "many": {peer: _ratio(many.get(peer)) for peer in PEERS},
        }


def _of(point: Mapping[str, Any] | None, value: Any, decimals: int) -> str:
    found = None if point is None else value(point)
    return "" if found is None else f"{found:.{decimals}f}"


def _ratio(point: Mapping[str, Any] | None) -> str:
    if point is None or point["ours_is_faster"] is None:
        return ""
    return f"{point['ours_is_faster']:.2f} x"


def errors(folder: Path) -> str:
    """Of every format that was measured."""
    document = newest("accuracy", folder)
    if document is None:
        return NOT_MEASURED
    bench = document["benches"]["accuracy"]
    sizes = bench["sizes"]
    listed = {p["method"].removesuffix(INT8_ACTIVATIONS) for p in bench["points"]}
    missing = [name for name in FORMATS if name not in listed]
    rest = f"\nNot measured: {', '.join(missing)}.\n" if missing else ""
    return (
        f"{_where(document)}, tier {bench['isa']}; hidden {sizes['hidden']}, intermediate "
        f"{sizes['intermediate']}, {sizes['experts']} experts, {sizes['top_k']} a token.\n\n"
        f"{markdown(tables.ACCURACY, bench['points'])}{rest}"
    )


def page(folder: Path) -> str:
    """docs/formats.md."""
    parts = [HEAD, "## Methods\n\n", methods_table(), "\n", FORMATS_HEAD, formats_table(), "\n"]
    return "".join([*parts, *speed(folder), "\n", ERRORS_HEAD, errors(folder)])


def with_errors(numerics: str, folder: Path) -> str:
    """docs/numerics.md with the table of errors between its marks."""
    begin, end = _MARKS
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not pattern.search(numerics):
        raise SystemExit(f"docs/numerics.md has no lines {begin!r} and {end!r}")
    return pattern.sub(lambda _: f"{begin}\n{errors(folder)}\n{end}", numerics)


def main() -> None:
    PAGE.write_text(page(RESULTS))
    NUMERICS.write_text(with_errors(NUMERICS.read_text(), RESULTS))
    print(PAGE, NUMERICS, sep="\n")


if __name__ == "__main__":
    main()
