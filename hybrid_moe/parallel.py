"""Work on items by threads that stay for the next call."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@functools.lru_cache(maxsize=4)
def _executor(threads: int, pid: int) -> ThreadPoolExecutor:  # a forked child makes its own
    return ThreadPoolExecutor(threads, thread_name_prefix="hybrid-moe-parallel")


def map_all(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Results of `work` for every item, in order of the items.

    The first error in that order lets calls that have begun end, starts no others and is raised.
    Here and in `for_each`, `work` must call neither of the two: it might wait for itself.
    """
    executor = _executor(threads, os.getpid())
    futures = [executor.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def for_each(items: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """Call `work(item)` for every item, in order of the items, on `threads` threads.

    An error, Ctrl-C included, lets calls that have begun end, starts no others and is raised.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    queue = iter(items)
    lock = threading.Lock()
    stop = threading.Event()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                try:
                    item = next(queue)
                except StopIteration:
                    return
            try:
                work(item)
            except BaseException:
                stop.set()
                raise

    if threads == 1:
        worker()
        return
    executor, futures = _executor(threads, os.getpid()), []
    try:
        for _ in range(threads):  # where the system allows fewer threads, this raises
            futures.append(executor.submit(worker))
        for future in futures:
            future.result()
    finally:
        stop.set()
        wait(futures)
