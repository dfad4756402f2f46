"""Files of /proc and /sys. One that is absent, hidden or unreadable counts as empty."""

from __future__ import annotations

from pathlib import Path

from hybrid_moe.logs import warn_once

ROOT = Path("/")
"""What the names in this package's tables are relative to; tests describe other machines there."""


def read(name: str) -> str:
    """Content of /`name`, "" where it cannot be read."""
    try:
        return (ROOT / name).read_text(errors="replace")
    except OSError:
        return ""


def lines(name: str) -> list[str]:
    """Lines of /`name`, none where it cannot be read."""
    return read(name).splitlines()


def integer(name: str) -> int | None:
    """The number in /`name`, None where it cannot be read or is a word ("max")."""
    try:
        return int(read(name))
    except ValueError:
        return None


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format, ascending: "0-3,8" -> (0, 1, 2, 3, 8).

    Raises:
        ValueError: it is no such list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def cpu_list(name: str, key: str = "") -> tuple[int, ...]:
    """Numbers of the list in /`name`, or in its line "key: list"; none where there is no list."""
    text = read(name)
    if key:
        rows = (line.partition(":") for line in text.splitlines())
        text = next((value for word, _, value in rows if word == key), "")
    try:
        return parse_cpu_list(text)
    except ValueError:
        warn_once(f"/{name} says {text.strip()[:80]!r}, which is no list of numbers: ignored")
        return ()


def numbered(folder: str, prefix: str) -> list[int]:
    """Numbers of the entries /`folder`/`prefix`N, ascending."""
    names = (entry.name.removeprefix(prefix) for entry in (ROOT / folder).glob(f"{prefix}[0-9]*"))
    return sorted(int(name) for name in names if name.isdecimal())
