"""Drivers run as Python, on real memory and on a clock that a test moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_moe.cpu_kernels.drivers import host, mailbox, patience, phases, route, spans, worker
from hybrid_moe.cpu_kernels.jit.record import Word


def _load(word: Word) -> int:
    return word.value


def _store(word: Word, value: int) -> None:
    word.value = value


def _fetch_add(word: Word, value: int) -> int:
    before = word.value
    word.value = before + value
    return before


def _compare_swap(word: Word, expected: int, desired: int) -> bool:
    if word.value != expected:
        return False
    word.value = desired
    return True


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
        "load_acquire": _load,
        "load_ordered": _load,
        "store_release": _store,
        "fetch_add": _fetch_add,
        "compare_swap": _compare_swap,
        "fence": lambda: None,
        "pause": pause,
        "nanoseconds": clock.now,
        "system_call": lambda *arguments: 0,
    }
    for module in (host, mailbox, patience, phases, route, spans, worker):
        for name, operation in operations.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, operation)
    return clock
