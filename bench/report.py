"""Receipts -> `docs/results/<date>-<processor>.json`, pictures, and `docs/results/README.md`.

    python bench/report.py RECEIPT.json ...

Receipts are what the other benchmarks write with --json; several of one benchmark are joined. A
benchmark that was stored on the same day and processor and is not among them stays. The page shows
every stored file, newest first. `roofline.svg`, which README shows, is drawn from the newest file
with a measured layer. Pictures need matplotlib: `pip install "hybrid-moe[bench]"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write_receipt
from sections import page

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

ROOFLINE = "roofline.svg"


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
    for path in render(RESULTS):
        print(path)


if __name__ == "__main__":
    main()
