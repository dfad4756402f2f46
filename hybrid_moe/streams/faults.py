"""Faults of jobs that nobody waited for: what a server asks after every step.

A graph replay runs no Python, so nothing can be raised where a worker fails. Its output is NaN, a
word of the process grows, and whoever calls `check_errors` after the step's results have arrived
gets the exception, with its message, for the batch that it belongs to. The next batch starts clean.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from hybrid_moe.cpu_kernels.streams.slots import closed_runs, faults
from hybrid_moe.locks import ProcessLock


class Reporter(Protocol):
    """A layer that remembers what went wrong in it."""

    @property
    def layer_idx(self) -> int: ...

    def take_error(self) -> Exception | None:
        """What went wrong since the last call; never waits."""


_reporters: weakref.WeakSet[Reporter] = weakref.WeakSet()
_lock = ProcessLock()
_checked = 0
_closed = 0


def attach(reporter: Reporter) -> None:
    """Let `check_errors` ask `reporter`."""
    with _lock:
        _reporters.add(reporter)


def check_errors() -> None:
    """Raise what workers have met on CUDA tensors since the last check, in any layer.

    To be called when a step's results have arrived on the host: after a graph replay and the copy
    of its tokens, say. Costs one comparison where all is well, and never waits.

    Raises:
        RuntimeError: workers failed or made no progress, or tokens were routed to an expert that is
            neither on the GPU nor loaded, or a graph was replayed whose layer is gone. IndexError:
            `strict` layers met ids out of range. The message begins with the first layer; the
            outputs of the failed runs are NaN (of ids out of range: without them).
    """
    global _checked, _closed
    count = faults()
    if count == _checked:
        return
    with _lock:
        runs = closed_runs()  # once: streams add to it at any moment
        _checked, closed, _closed = count, runs - _closed, runs
        reporters = sorted(_reporters, key=lambda reporter: reporter.layer_idx)
    errors = [error for reporter in reporters if (error := reporter.take_error()) is not None]
    if closed > 0:
        errors.append(
            RuntimeError(
                "a CUDA graph was replayed after a layer that it runs had been closed or dropped: "
                "its output is NaN"
            )
        )
    if len(errors) > 1:
        raise type(errors[0])(f"{errors[0]} (and {len(errors) - 1} more layers failed)")
    if errors:
        raise errors[0]
