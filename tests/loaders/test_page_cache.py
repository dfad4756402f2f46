"""When pages of a checkpoint are let go of: all that was read, or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.loaders import Checkpoint, load_layer
from hybrid_moe.loaders.page_cache import VARIABLE, releases_pages
from tests.families import EXPERTS, FamilyFixture

Range = tuple[int, int]
"""Offset and bytes."""


@pytest.fixture
def expected() -> list[Range]:
    """Ranges that the kernel is to read ahead."""
    return []


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, expected: list[Range]) -> list[Range]:
    """Ranges that are let go of."""
    sizes: list[Range] = []

    def advise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        (sizes if advice == os.POSIX_FADV_DONTNEED else expected).append((offset, nbytes))
        assert advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.delenv(VARIABLE, raising=False)
    return sizes


def load(family: Callable[[str], FamilyFixture]) -> int:
    """Load a layer; the bytes of all its experts."""
    source = Checkpoint.open(family("qwen3_moe_mxfp4").directory).layer(1)
    wanted = np.ones(EXPERTS, np.bool_)
    load_layer(source, np.arange(EXPERTS), wanted, lambda *_: None, formats=MXFP4)
    return source.num_experts * source.expert_nbytes


def test_the_variable_decides(
    family: Callable[[str], FamilyFixture], released: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "keep")
    load(family)
    assert released == []
    monkeypatch.setenv(VARIABLE, " Release")
    assert load(family) == sum(nbytes for _, nbytes in released)
    monkeypatch.setenv(VARIABLE, "drop")
    with pytest.raises(ValueError, match=f'{VARIABLE} must be "keep" or "release"'):
        load(family)


@pytest.mark.usefixtures("released")
def test_else_the_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """There must be room for the files and for the weights."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert not releases_pages(500) and releases_pages(501)


def test_a_small_checkpoint_stays(
    family: Callable[[str], FamilyFixture], released: list[Range]
) -> None:
    load(family)
    assert released == []


def test_the_next_experts_are_read_ahead(
    family: Callable[[str], FamilyFixture],
    released: list[Range],
    expected: list[Range],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread is one expert ahead: all ranges but those of the first expert, and no others."""
    monkeypatch.setenv(VARIABLE, "release")
    nbytes = load(family)
    assert sum(size for _, size in expected) == nbytes // EXPERTS * (EXPERTS - 1)
    assert expected == released[-len(expected) :]
