"""Locks of a process that may fork.

A lock that another thread holds at a fork stays locked in the child for ever, since the thread that
would open it does not exist there. Locks that outlive a call, in a module or a class, are therefore
of this kind.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable


class ProcessLock:
    """A lock that is open in a forked child, whoever holds it in the parent.

    What it protects may then be half changed, unless each change is a single store.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    def acquire(self, timeout: float = -1) -> bool:
        """Take it, or give up after `timeout` seconds (-1: never). True if it was taken."""
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Open it."""
        self._lock.release()

    # `with` calls the methods of the lock itself, as for a plain lock. A Python function in between
    # would be a place where Ctrl-C leaves the lock taken, with nobody to open it.
    @property
    def __enter__(self) -> Callable[[], bool]:
        return self._lock.__enter__

    @property
    def __exit__(self) -> Callable[..., None]:
        return self._lock.__exit__


_all: weakref.WeakSet[ProcessLock] = weakref.WeakSet()


def _open_in_child() -> None:
    for lock in list(_all):
        lock._lock = threading.Lock()


os.register_at_fork(after_in_child=_open_in_child)
