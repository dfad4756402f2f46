"""Which lines of the parsers a run has executed: `python -m tests.fuzz.loaders --lines`."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class LineCounter:
    """While it is entered, notes the lines of some files that are executed on this thread."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._executed: dict[str, set[int]] = {str(file): set() for file in files}

    def __enter__(self) -> LineCounter:
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        lines = self._executed.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def on_line(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            lines.add(frame.f_lineno)
            return on_line

        return on_line

    def report(self) -> str:
        """A line for each file: how much of its functions was executed, and what was not."""
        rows = []
        for name, executed in self._executed.items():
            there = set(_lines(compile(Path(name).read_text("utf-8"), name, "exec")))
            missing = sorted(there - executed)
            share = 1 - len(missing) / max(1, len(there))
            said = ", ".join(map(str, missing)) or "none"
            rows.append(f"  {Path(name).name}: {share:.0%} of {len(there)} lines; not: {said}")
        return "\n".join(rows)


def _lines(code: CodeType) -> Iterator[int]:
    """Lines of the functions in a module: those that calls of it can execute."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _lines(part)
    if code.co_flags & inspect.CO_OPTIMIZED:  # a function, no module or class
        first = code.co_firstlineno
        starts = (line for _, line in dis.findlinestarts(code) if line is not None)
        yield from (line for line in starts if line > first)
