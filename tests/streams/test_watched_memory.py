"""The ledger finds what can still be reached after it is freed, and writes to it."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.memory import Arena
from tests.streams.watched_memory import POISON, Ledger, UseAfterFreeError, watched


def chain(ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """A root's block that points into another, whose words are the test's."""
    first, second = np.zeros(3, np.int64), np.zeros(100, np.int64)
    first[1] = second.ctypes.data + 8
    root = int(first.ctypes.data)
    ledger.roots.append(lambda: [root])
    ledger.check()
    return first, second


def test_freed_arrays_that_can_be_reached() -> None:
    with watched() as ledger:
        first, second = chain(ledger)
        address = int(second.ctypes.data)
        del second
        with pytest.raises(UseAfterFreeError, match=r"pieces of \[800\] B"):
            ledger.check()
        assert ctypes.string_at(address, 800) == bytes([POISON]) * 800
        first[1] = 0
        ledger.check()


def test_freed_arenas_that_can_be_reached() -> None:
    with watched() as ledger:
        _, second = chain(ledger)
        arena = Arena(1000)
        second[50], view = arena.address + 999, arena.bytes[10:20]
        del arena
        ledger.check()  # a view keeps it
        del view
        gc.collect()
        with pytest.raises(UseAfterFreeError, match=r"pieces of \[1000\] B"):
            ledger.check()
        second[50] = 0
        ledger.check()


def test_freed_memory_is_not_handed_out_again() -> None:
    with watched() as ledger:
        addresses = {int(np.zeros(64, np.int64).ctypes.data) for _ in range(50)}
        assert len(addresses) == 50
        before = ledger.live_bytes()
        kept = np.zeros(64, np.int64)
        assert ledger.live_bytes() - before == kept.nbytes


def test_writes_to_freed_memory() -> None:
    with pytest.raises(UseAfterFreeError, match="wrote to 24 freed bytes"), watched():
        array = np.zeros(3, np.int64)
        address = int(array.ctypes.data)
        del array
        ctypes.c_int64.from_address(address).value = 1
