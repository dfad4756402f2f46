"""Work on items by threads."""

from __future__ import annotations

import os
import threading

import pytest

from hybrid_moe.parallel import for_each, map_all


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_once(threads: int) -> None:
    seen: list[int] = []
    for_each(iter(range(100)), seen.append, threads)
    assert sorted(seen) == list(range(100))
    assert map_all(lambda item: -item, iter(range(100)), threads) == [-item for item in range(100)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_stops_the_rest(error: type[BaseException], threads: int) -> None:
    """And what has begun ends before it is raised."""
    together = threading.Barrier(threads)
    running, ended = [], []

    def work(item: int) -> None:
        running.append(item)
        together.wait(timeout=60)
        if item == 0:
            raise error("stop")
        ended.append(item)

    with pytest.raises(error, match="stop"):
        for_each(range(3), work, threads)
    assert len(ended) == len(running) - 1 == threads - 1
    for_each(range(9), ended.append, threads)  # the threads are of use after that
    assert len(ended) == threads - 1 + 9


def test_the_first_error_of_a_map_is_the_first_item_s() -> None:
    later = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            later.wait(timeout=60)
            raise ValueError("item 1")
        if item == 2:
            later.set()
            raise ValueError("item 2")
        return item

    with pytest.raises(ValueError, match="item 1"):
        map_all(work, range(3), 3)


def test_callers_at_the_same_time_share_the_threads() -> None:
    results: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        seen: list[int] = []
        for_each(range(200), seen.append, 2)
        results[caller] = seen

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert [sorted(results[caller]) for caller in range(8)] == [list(range(200))] * 8


def test_a_forked_child_has_threads_of_its_own() -> None:
    assert map_all(abs, [-1, -2], 2) == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(0 if map_all(abs, [-3, -4], 2) == [3, 4] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [0, -1])
def test_too_few_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be at least 1, not {threads}"):
        for_each([1], print, threads)
