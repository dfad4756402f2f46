"""Page-locked arenas, with the runtime's two calls recorded."""

from __future__ import annotations

import ctypes
import dataclasses
import logging

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
