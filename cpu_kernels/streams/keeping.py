"""Memory whose owner is gone, while a stream, the watcher or workers may still touch it.

Nothing here waits, starts a thread or asks a GPU, since owners are dropped wherever the garbage
collector runs, which may be inside a capture. Idle memory is freed at the next submission, at the
next run of the garbage collector, or when `release` is called.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from typing import Protocol


class Passing(Protocol):
    """Something that streams or workers are at: a graph job's progress, a change of a table."""

    @property
    def idle(self) -> bool:
        """Whether that is over."""


_LOOKS = 8
"""Entries that a submission looks at; each adds one at most."""

_busy: deque[tuple[Passing, object]] = deque()
_replayable: list[object] = []
_inherited: list[object] = []


def until_idle(progress: Passing, memory: object) -> None:
    """Keep `memory` until `progress` is idle. May be called from finalizers."""
    if not progress.idle:
        _busy.append((progress, memory))


def for_good(memory: object) -> None:
    """Keep what replays of a graph touch, since the end of a graph is not reported."""
    _replayable.append(memory)


def release(most: int | None = _LOOKS) -> None:
    """Free what has become idle.

    Args:
        most: entries to look at, oldest first; None for all.
    """
    # Several threads may do this at the same time, and the collector in the middle of it. A busy
    # entry never leaves the queue: an interrupt may fall between any two steps.
    for _ in range(len(_busy) if most is None else min(most, len(_busy))):
        try:
            entry = _busy[0]
            if entry[0].idle:
                _busy.remove(entry)
            else:
                _busy.rotate(-1)
        except (IndexError, ValueError):  # another thread was faster
            continue


def count() -> tuple[int, int]:
    """Entries that wait to be idle, and entries that stay for graphs."""
    return len(_busy), len(_replayable)


def _after_collection(phase: str, _: object) -> None:
    if phase == "stop" and _busy:
        release(most=None)


gc.callbacks.append(_after_collection)


def _set_aside_in_child() -> None:
    """In a forked child nothing of the parent's becomes idle, and its memory is not touched."""
    _inherited.extend(_busy)
    _busy.clear()


os.register_at_fork(after_in_child=_set_aside_in_child)
