"""Page-locked arenas, with the runtime's two calls recorded."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os

import pytest

from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.streams import page_lock as module
from hybrid_moe.streams.page_lock import PageLocks, page_lock, trial


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> PageLocks:
    locks = PageLocks()
    monkeypatch.setattr(module, "LOCKS", locks)
    return locks


def test_an_arena_is_locked_while_it_lives(locks: PageLocks) -> None:
    """It is unlocked once, when its last view is gone and before it is unmapped."""
    arena, calls = Arena(1 << 20), []

    def register(address: int, nbytes: int) -> None:
        calls.append(("lock", address, nbytes))

    def unregister(address: int) -> None:
        ctypes.memset(address, 1, 1 << 20)  # mapped
        calls.append(("unlock", address, 0))

    address = arena.address
    assert page_lock(arena, register, unregister)
    assert calls == [("lock", address, 1 << 20)]
    assert (locks.locked, locks.refused) == (1 << 20, 0)
    view = arena.bytes[10:20]
    del arena
    assert len(calls) == 1, "a view holds it"
    del view
    assert calls[1:] == [("unlock", address, 0)]
    assert locks.locked == 0


@pytest.mark.usefixtures("locks")
def test_a_forked_child_unlocks_nothing() -> None:
    """What is not mapped there is not the child's to unlock."""
    arena, read_end, write_end = Arena(1 << 20), *os.pipe()
    unlock = lambda address: os.write(write_end, b"unlocked")  # noqa: E731
    assert page_lock(arena, lambda address, nbytes: None, unlock)
    child = os.fork()
    if child == 0:
        del arena
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    del arena
    assert os.read(read_end, 100) == b"unlocked", "once, by the parent"
    os.close(read_end)
    os.close(write_end)


def test_refusal(locks: PageLocks, caplog: pytest.LogCaptureFixture) -> None:
    """Counted and said once; nothing is unlocked that was not locked."""
    refuse = lambda address, nbytes: "out of memory (error 2)"  # noqa: E731
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not page_lock(Arena(4096), refuse, lambda _: pytest.fail("unlocked"))
    assert len([r for r in caplog.records if "ulimit -l" in r.message]) == 1
    assert (locks.locked, locks.refused) == (0, 8192)
    done = dataclasses.replace(locks, locked=3 * 8192, seconds=0.5)
    assert "page-locked (75%) in 0.5 s" in str(done)
    assert page_lock(Arena(0), refuse)


def test_trial(locks: PageLocks) -> None:
    """What `doctor` says; nothing stays locked, and nothing is counted."""
    unlocked: list[int] = []
    assert "1 MiB in" in trial(1 << 20, lambda *_: None, unlocked.append)
    assert len(unlocked) == 1
    assert "refused: out of memory" in trial(4096, lambda *_: "out of memory", unlocked.append)
    assert len(unlocked) == 1 and locks == PageLocks()
