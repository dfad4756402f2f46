"""Acting on a module when it is imported."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from hybrid_moe.integrations.sglang.late import when_imported

NAME = "hybrid_moe_late_target"
Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the module that is waited for."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def to(text: str) -> None:
        (tmp_path / f"{NAME}.py").write_text(text)
        importlib.invalidate_caches()

    to("value = 1")
    yield to
    sys.modules.pop(NAME, None)


def test_before_and_after_the_import(write: Write) -> None:
    seen: list[int] = []

    def act(module: ModuleType) -> None:
        seen.append(module.value)

    when_imported(NAME, act)
    assert NAME not in sys.modules and seen == []
    module = importlib.import_module(NAME)
    assert seen == [1]
    when_imported(NAME, act)
    assert seen == [1, 1]
    write("value = 23")
    importlib.reload(module)  # a watch that was there already is there once
    assert seen == [1, 1, 23]


def test_the_module_shows_nothing_of_it(write: Write) -> None:
    when_imported(NAME, lambda module: None)
    module = importlib.import_module(NAME)
    assert type(module.__loader__) is SourceFileLoader
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__


def test_who_only_looks_does_not_use_it_up(write: Write) -> None:
    seen: list[str] = []
    when_imported(NAME, lambda module: seen.append(module.__name__))
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.loader is not None
    assert spec.loader.get_source(NAME) == "value = 1"  # type: ignore[attr-defined]
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [NAME]


def test_several_wait_for_one_module(write: Write) -> None:
    """Two copies of this package, or two of its parts."""
    seen: list[str] = []
    for name in "abc":
        when_imported(NAME, lambda module, name=name: seen.append(name))  # type: ignore[misc]
    importlib.import_module(NAME)
    assert sorted(seen) == ["a", "b", "c"]


def test_an_import_that_fails_may_be_tried_again(write: Write) -> None:
    seen: list[int] = []
    when_imported(NAME, lambda module: seen.append(module.value))
    write("raise ImportError('not now')")
    with pytest.raises(ImportError, match="not now"):
        importlib.import_module(NAME)
    write("value = 34")
    importlib.import_module(NAME)
    assert seen == [34]


@pytest.mark.parametrize("early", [True, False])
def test_an_act_that_fails_is_logged(
    write: Write, early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def act(module: ModuleType) -> None:
        raise KeyError("from_pretrained")

    if early:
        importlib.import_module(NAME)
    with caplog.at_level(logging.ERROR, logger="hybrid_moe"):
        when_imported(NAME, act)
        assert importlib.import_module(NAME).value == 1
    assert caplog.messages == [f"hybrid_moe could not hook into {NAME} and does without"]
    assert "KeyError: 'from_pretrained'" in caplog.text


def test_no_module_of_that_name(write: Write) -> None:
    when_imported("no_such_module", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
