"""Memory of finished jobs, kept for later ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

_MOST_JOBS = 16
_MOST_BYTES = 256 << 20


class Reusable(Protocol):
    """Something with a shape that decides who may use it next."""

    @property
    def shape(self) -> Hashable: ...
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Reusable)
S = TypeVar("S", bound=Hashable)


class IdleJobs(Generic[T]):
    """Idle jobs, least recently used first; the last one given back is always kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[T] = []

    def borrow(self, shape: S, make: Callable[[S], T]) -> T:
        """An idle job of this shape, or a new one."""
        with self._lock:
            for index in range(len(self._jobs) - 1, -1, -1):
                if self._jobs[index].shape == shape:
                    return self._jobs.pop(index)
        return make(shape)

    def give_back(self, job: T) -> None:
        """Keep `job`, and drop old ones past 16 jobs or 256 MiB."""
        with self._lock:
            self._jobs.append(job)
            while len(self._jobs) > 1 and (
                len(self._jobs) > _MOST_JOBS
                or sum(idle.nbytes for idle in self._jobs) > _MOST_BYTES
            ):
                self._jobs.pop(0)

    def clear(self) -> None:
        """Drop all idle jobs."""
        with self._lock:
            self._jobs.clear()
