"""Feeds the loaders generated inputs: `python -m tests.fuzz.loaders --inputs 1000000 --seed 1`.

Input number n of a seed is the same in every run: `--first n --inputs 1` repeats it alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter

import hybrid_moe.loaders
from tests.fuzz import folders, gguf_files, headers, layers
from tests.fuzz.lines import LineCounter

PER_FOLDER = 50
"""Inputs for each that needs files on a disk, which takes as long as all the others."""


@dataclass
class Report:
    """What has been tried.

    Attributes:
        inputs: inputs of each kind.
        accepted: of these, those that got through: past the header, to the last layer.
        failures: (number, kind, traceback) of each input that went wrong.
        seconds: the time it took.
        interrupted: whether Ctrl-C ended it.
    """

    inputs: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        total = self.inputs.total()
        lines = [
            f"{total} inputs, {total / max(self.seconds, 1e-9):.0f} a second, "
            f"{len(self.failures)} failures"
        ]
        for kind, count in self.inputs.items():
            lines.append(f"  {kind}: {count}, {self.accepted[kind] / count:.1%} accepted")
        return "\n".join(lines)


def run(first: int, count: int, seed: int, folder: Path, most_failures: int = 10) -> Report:
    """Try inputs `first` to `first + count - 1` of `seed`; `folder` is for files.

    Ctrl-C ends it with the report of what has been tried.
    """
    report = Report()
    started = perf_counter()
    try:
        for number in range(first, first + count):
            rng = Random(f"{seed} {number}")
            kind, check = _check_of(number, rng, folder)
            report.inputs[kind] += 1
            try:
                report.accepted[kind] += check()
            except Exception:
                report.failures.append((number, kind, traceback.format_exc()))
                if len(report.failures) == most_failures:
                    break
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = perf_counter() - started
    return report


def _check_of(number: int, rng: Random, folder: Path) -> tuple[str, Callable[[], bool]]:
    if number % PER_FOLDER == 0:
        return "folders", lambda: folders.check_folder(rng, folder / "folder")
    if number % PER_FOLDER == 1:
        return "JSON files", lambda: folders.check_json(rng, folder)
    if number % 4 == 2:
        case = gguf_files.generate(rng)
        # the library takes as long as forty of our headers, an expert as ten
        every = number // 4
        return "GGUF", lambda: gguf_files.check(case, every % 32 == 0, every % 8 == 0)
    if number % 3 == 0:
        return "layers", lambda: layers.check(layers.generate(rng))
    return "headers", lambda: headers.check(headers.generate(rng))


def parsers() -> list[Path]:
    """The files whose lines count."""
    loaders = Path(hybrid_moe.loaders.__file__).parent
    names = ("header.py", "header_text.py", "gguf/gguf_header.py", "gguf/header_bytes.py")
    return [loaders / name for name in (*names, "describe.py", "stored.py", "naming.py")]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--lines", action="store_true", help="say which lines were executed (slow)")
    options = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        counter = LineCounter(parsers()) if options.lines else nullcontext()
        with counter:
            report = run(options.first, options.inputs, options.seed, Path(folder))
    for number, kind, text in report.failures:
        print(f"--- input {number} ({kind}):\n{text}", file=sys.stderr)
    print(report)
    if isinstance(counter, LineCounter):
        print(counter.report())
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
