"""One progress bar for everything that is packed: bytes, GB/s and the time left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm


class PackingBar:
    """A bar on stderr that any thread may advance."""

    def __init__(self, title: str, shown: bool) -> None:
        """Args:
        title: what it says.
        shown: False hides it; otherwise a terminal shows it.
        """
        self._bar = tqdm(
            desc=title, total=0, unit="B", unit_scale=True, disable=None if shown else True
        )
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """So many bytes more will come."""
        with self._lock:
            self._bar.total += nbytes
            self._bar.refresh()

    def add(self, nbytes: int) -> None:
        """So many bytes are packed."""
        with self._lock:
            self._bar.update(nbytes)

    def each(self, nbytes: int) -> Callable[[int, int], None]:
        """What adds these bytes in even parts: called with (done, total)."""

        def progress(done: int, total: int) -> None:
            self.add(nbytes * done // total - nbytes * (done - 1) // total)

        return progress

    def __enter__(self) -> PackingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
