"""What holds after every test of the kernels, and what several of them share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hybrid_moe import binary_cache as cache
from hybrid_moe.cpu_kernels.jit import compile
from hybrid_moe.cpu_kernels.memory import Arena
from tests.cpu_kernels.amx import emulator


@pytest.fixture(autouse=True)
def no_errors_of_emulated_instructions() -> Iterator[None]:
    """Emulated AMX did nothing that a processor would refuse, and no thread kept its tiles."""
    yield
    errors = emulator().errors[:]
    emulator().errors.clear()
    assert not errors
    patience = time.monotonic() + 30  # a job is complete before its last thread has left it
    while emulator().configured and time.monotonic() < patience:
        time.sleep(0.001)
    assert not emulator().configured


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the arenas that are made from now on."""
    sizes: list[int] = []
    init = Arena.__init__

    def counted(self: Arena, nbytes: int, numa_nodes: Sequence[int] = ()) -> None:
        sizes.append(nbytes)
        init(self, nbytes, numa_nodes)

    monkeypatch.setattr(Arena, "__init__", counted)
    return sizes


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty object cache."""
    monkeypatch.setenv("HYBRID_MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_told", set())
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules that were compiled."""
    compiled: list[str] = []
    optimize = compile.optimize

    def counted(module, machine):  # type: ignore[no-untyped-def]
        compiled.append(module.name)
        optimize(module, machine)

    monkeypatch.setattr(compile, "optimize", counted)
    return compiled
