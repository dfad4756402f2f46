"""Measurements as JSON lines: each is written as soon as it is there, so that a step that is
stopped loses only what it has not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Points:
    """Writes to a file, or to the screen where none is given."""

    def __init__(self, path: str | None) -> None:
        self._file = Path(path).open("a") if path else sys.stdout  # noqa: SIM115 (until the end)

    def add(self, bench: str, **fields: Any) -> None:
        """One measurement; None for what was not measured."""
        self._file.write(json.dumps({"bench": bench, **fields}) + "\n")
        self._file.flush()


def read_points(path: Path) -> list[dict[str, Any]]:
    """What was written, without a last line that is cut off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
