"""The thread that reads the mailboxes of GPU streams, see `drivers.mailbox`.

It runs compiled code without the GIL and looks at all mailboxes in a loop. Each is one cache line
that changes only when a stream posts, so a look at some dozens costs well under a microsecond. The
thread spins while streams are active and naps between looks when none has been for a while. It
needs a core of its own beside the workers: give the pool one thread less than there are cores.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import threading

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.pool.group import FUTEX_NUMBERS
from hybrid_moe.locks import ProcessLock

_HOT_NS = 20_000_000  # steps of a decoding server follow each other more closely
_NAP_NS = 50_000


class Watcher:
    """Mailboxes and the thread that reads them.

    Args:
        hot_ns: how long to spin after the last sign of life.
        nap_ns: between two looks after that.
    """

    def __init__(self, hot_ns: int = _HOT_NS, nap_ns: int = _NAP_NS) -> None:
        self.control = records.Watcher.new()
        self.control.futex = FUTEX_NUMBERS[platform.machine()]
        self.control.hot_ns = hot_ns
        self.control.nap[1] = nap_ns
        self.address = self.control.address
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._kept: list[object] = []

    def add(self, mailbox: int, owner: object) -> bool:
        """Serve what is posted at `mailbox`, the address of a `records.Mailbox` of zeros.

        Args:
            owner: of that memory; kept for as long as the process lives.

        Returns:
            False if there are too many mailboxes already.
        """
        with self._lock:
            count = self.control.count.value
            if count == records.MAX_POSTS:
                return False
            self._kept.append(owner)
            self.control.posts[count].mailbox.value = mailbox
            self.control.count.value = count + 1  # a post whose address is not yet seen is unused
            return True

    def start(self) -> None:
        """Start the thread, if it does not run."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="hybrid_moe-watcher", daemon=True
                )
                self._thread.start()
                atexit.register(self.stop)

    def _run(self) -> None:
        watch = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(drivers.addresses()["watch"])
        watch(self.address)

    def stop(self) -> None:
        """End the thread; jobs under way fail, so that no stream waits for them."""
        with self._lock:
            self.control.stop.value = 1
            if self._thread is not None:
                self._thread.join(timeout=1.0)


_watcher: Watcher | None = None
_watcher_lock = ProcessLock()


def watcher() -> Watcher:
    """The process's watcher, running."""
    global _watcher
    with _watcher_lock:
        if _watcher is None:
            _watcher = Watcher()
        _watcher.start()
        return _watcher


def _start_anew_in_child() -> None:
    """The parent's thread does not exist in the child."""
    global _watcher
    _watcher = None


os.register_at_fork(after_in_child=_start_anew_in_child)
