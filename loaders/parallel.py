"""One loop over items on a few threads, each with memory of its own, that stops at an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hybrid_moe.loaders.safetensors import ReadBuffer

T = TypeVar("T")


def for_each(items: Iterable[T], work: Callable[[T, ReadBuffer], None], threads: int) -> None:
    """Call `work(item, buffer)` for every item, in order of the items, on `threads` threads.

    An error, Ctrl-C included, lets calls that have begun end, starts no others and is raised.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    queue = iter(items)
    lock = threading.Lock()
    stop = threading.Event()

    def worker() -> None:
        buffer = ReadBuffer()
        while not stop.is_set():
            with lock:
                try:
                    item = next(queue)
                except StopIteration:
                    return
            try:
                work(item, buffer)
            except BaseException:
                stop.set()
                raise

    if threads == 1:
        worker()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="hybrid-moe-load") as pool:
        futures = [pool.submit(worker) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
