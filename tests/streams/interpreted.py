"""Drivers run as Python, on real memory and on a clock that a test moves."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_moe.cpu_kernels.drivers import host, mailbox, patience, phases, route, worker


def _word(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


def _load(address: int) -> int:
    return _word(address).value


def _store(address: int, value: int) -> None:
    _word(address).value = value


def _fetch_add(address: int, value: int) -> int:
    before = _load(address)
    _store(address, before + value)
    return before


def _compare_swap(address: int, expected: int, desired: int) -> bool:
    if _load(address) != expected:
        return False
    _store(address, desired)
    return True


def _load32(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


def _store32(address: int, value: int) -> None:
    ctypes.c_int32.from_address(address).value = value


def _load8(address: int) -> int:
    return ctypes.c_uint8.from_address(address).value


def _store8(address: int, value: int) -> None:
    ctypes.c_uint8.from_address(address).value = value


class Clock:
    """CLOCK_MONOTONIC, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0

    def now(self) -> int:
        return time.monotonic_ns() + self.ahead

    def pass_by(self, nanoseconds: int) -> None:
        self.ahead += nanoseconds


def interpret(monkeypatch: pytest.MonkeyPatch, pause: Callable[[], None]) -> Clock:
    """Let drivers that are called from Python run on memory and on a new clock.

    Args:
        pause: what a spin loop does.
    """
    clock = Clock()
    operations: dict[str, Any] = {
        "load64": _load,
        "store64": _store,
        "load_acquire": _load,
        "load_ordered": _load,
        "store_release": _store,
        "fetch_add": _fetch_add,
        "compare_swap": _compare_swap,
        "load32": _load32,
        "store32": _store32,
        "load8": _load8,
        "store8": _store8,
        "fence": lambda: None,
        "pause": pause,
        "nanoseconds": clock.now,
        "system_call": lambda *arguments: 0,
    }
    for module in (host, mailbox, patience, phases, route, worker):
        for name, operation in operations.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, operation)
    return clock
