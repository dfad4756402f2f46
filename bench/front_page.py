"""README's table of whole models, written from stored results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import Column, markdown, number, ratio, share, text

BEGIN, END = "<!-- whole models:begin -->\n", "<!-- whole models:end -->\n"
OURS, PEER = "ours", "llama.cpp"

COLUMNS = (
    text("model", "{model}"),
    Column("tokens before", lambda p: str(p["context"])),
    number("decode, tok/s", "decode_tokens_per_s", 1),
    share("% of the roofline", "decode_share"),
    ratio(f"faster than {PEER}", "faster_decode"),
    number("prefill, tok/s", "prefill_tokens_per_s", 1),
    share("% of the peak", "prefill_share"),
    ratio(f"faster than {PEER}", "faster_prefill"),
    Column("memory, GB", lambda p: f"{p['memory'] / 1e9:.1f}"),
)


def paragraphs(document: dict[str, Any]) -> Iterator[str]:
    """The text between the marks, of a stored document with whole models."""
    points = document["benches"]["end_to_end"]["points"]
    peers = {key(p): p for p in points if p["engine"] == PEER}
    rows = [
        {
            **p,
            "model": f"{p['model']}, {p['dense']}",
            "faster_decode": peers.get(key(p), {}).get("ours_decodes_faster"),
            "faster_prefill": peers.get(key(p), {}).get("ours_prefills_faster"),
        }
        for p in points
        if p["engine"] == OURS
    ]
    yield (
        f"Whole models, MXFP4 experts and random weights in published dimensions, on "
        f"{document['processor']} with {points[0]['threads']} threads, {document['date']}. The "
        "roofline is the read bandwidth of the same seconds over the bytes that a token reads, KV "
        f"cache included; × is how much faster than {PEER} with the same weights, in turn.\n"
    )
    yield markdown(COLUMNS, rows)


def key(point: dict[str, Any]) -> tuple[str, str, int]:
    """What a point and its peer's have in common."""
    return point["model"], point["dense"], point["context"]


def write(readme: Path, results: Path) -> list[Path]:
    """Write the table of the newest results that have whole models; returns what was written.

    Raises:
        ValueError: the page has no place for it.
    """
    for path in sorted(results.glob("*.json"), reverse=True):
        document = json.loads(path.read_text("utf-8"))
        if "end_to_end" in document["benches"]:
            before, found, rest = readme.read_text("utf-8").partition(BEGIN)
            _, closed, after = rest.partition(END)
            if not (found and closed):
                raise ValueError(f"{readme} has no place between {BEGIN.strip()} and {END.strip()}")
            body = "\n".join(paragraphs(document))
            readme.write_text(f"{before}{BEGIN}{body}{END}{after}", "utf-8")
            return [readme]
    return []
