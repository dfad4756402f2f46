"""The object cache, dumps, and a start without a compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.dsl.emit import I32, Emit, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE
from hybrid_moe.cpu_kernels.jit import cache, compile, native
from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions
from tests.cpu_kernels.toolbox import callable_at, run_script

TARGET = PORTABLE.target


def _text(value: int) -> str:
    """A module whose function `answer(out)` stores `value`."""

    def body(emit: Emit, out: Val) -> None:
        emit.store(out, emit.splat(value, I32))

    return build_module([("answer", 1, body)], PORTABLE, "answer")


def _answer(value: int, target: Target = TARGET) -> int:
    address = compile_functions(_text(value), target, ["answer"], "answer")["answer"]
    out = np.zeros(1, np.int32)
    callable_at(address, 1)(out)
    return int(out[0])


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HYBRID_MOE_CACHE_DIR", str(tmp_path / "cache"))
    cache._usable.cache_clear()
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


def test_a_cached_object_is_not_compiled_again(directory: Path, compilations: list[str]) -> None:
    assert [_answer(7), _answer(7), _answer(7)] == [7, 7, 7]
    assert len(compilations) == 1
    assert len(list(directory.glob("*.o"))) == 1
    assert not list(directory.glob("*.tmp"))


def test_the_key_is_all_that_shapes_the_code(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [_answer(1), _answer(2)] == [1, 2]
    assert _answer(1, Target("x86-64-v2" if TARGET.cpu == "" else "")) == 1
    monkeypatch.setattr(compile, "ABI", compile.ABI + 1)
    assert _answer(1) == 1
    assert len(compilations) == 4 == len(list(directory.glob("*.o")))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_rebuilt(
    damage: str, directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert _answer(3) == 3
    (entry,) = directory.glob("*.o")
    good = entry.read_bytes()
    bad = {"flip": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], "truncate": good[:100]}
    entry.write_bytes(bad.get(damage, b""))
    with caplog.at_level(logging.WARNING):
        assert _answer(3) == 3
    assert len(compilations) == 2
    assert "damaged" in caplog.text
    assert entry.read_bytes() == good
    assert _answer(3) == 3 and len(compilations) == 2


def test_the_directory_is_private(directory: Path) -> None:
    _answer(4)
    assert directory.stat().st_mode & 0o777 == 0o700


def _assert_in_memory(
    directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    """The kernels work, nothing is stored, and one warning says why."""
    with caplog.at_level(logging.WARNING, logger=cache.__name__):
        assert [_answer(5), _answer(5), _answer(6)] == [5, 5, 6]
    assert len(compilations) == 3
    (record,) = caplog.records
    assert str(directory) in record.getMessage() and reason in record.getMessage()
    assert not directory.is_dir() or not list(directory.iterdir())


@pytest.mark.parametrize("mode", [0o770, 0o722, 0o777])
def test_a_directory_that_others_may_write_to(
    mode: int, directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    directory.chmod(mode)
    _assert_in_memory(directory, compilations, caplog, "chmod 700")


def test_a_directory_of_another_user(
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    _assert_in_memory(directory, compilations, caplog, f"user {os.getuid()}")


def test_a_directory_that_cannot_be_made(
    directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file is in the way")
    _assert_in_memory(directory, compilations, caplog, "exists")


def test_a_read_only_directory(
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(cache.os, "access", lambda *_: False)  # root may write anywhere
    _assert_in_memory(directory, compilations, caplog, "not writable")


def test_an_entry_that_cannot_be_read(
    directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert _answer(11) == 11
    (entry,) = directory.glob("*.o")
    entry.unlink()
    entry.mkdir()
    with caplog.at_level(logging.WARNING):
        assert _answer(11) == 11
    assert len(compilations) == 2
    assert "cannot read" in caplog.text and "cannot write" in caplog.text


def test_a_full_disk_costs_a_warning(
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", full)
    with caplog.at_level(logging.WARNING):
        assert _answer(8) == 8
    assert "No space left" in caplog.text and compilations


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HYBRID_MOE_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/hybrid_moe"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/hybrid_moe"),
    ],
)
def test_where_the_cache_is(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HYBRID_MOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_directory() == Path(expected)


def test_a_function_that_is_not_there(directory: Path) -> None:
    with pytest.raises(RuntimeError, match=r"label.*nothing"):
        compile_functions(_text(1), TARGET, ["answer", "nothing"], "label")


# dumps


@pytest.mark.parametrize("separator", [" ", ":"])
@pytest.mark.parametrize(
    ("kind", "suffix", "content"), [("asm", "s", "answer:"), ("ir", "ll", "define void")]
)
def test_dump(
    kind: str,
    suffix: str,
    content: str,
    separator: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of what comes out of the cache."""
    assert _answer(9) == 9
    monkeypatch.setenv("HYBRID_MOE_DUMP", f"{kind}{separator}{tmp_path / 'new' / 'dumps'}")
    assert _answer(9) == 9
    assert content in (tmp_path / "new" / "dumps" / f"answer.{suffix}").read_text()


@pytest.mark.parametrize("value", ["asm", "obj dumps", "ir:", "yes"])
def test_a_dump_request_that_cannot_be(
    value: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_MOE_DUMP", value)
    with pytest.raises(ValueError, match="HYBRID_MOE_DUMP"):
        _answer(10)


# fresh processes

_FORWARD = """
import sys, logging
logging.basicConfig(level=logging.DEBUG)
from hybrid_moe.formats import MXFP4
from tests.cpu_kernels.cases import Case, random_batch
case = Case.random(MXFP4, 64, 96)
out = case.layer().forward(*random_batch(3, case.H, case.E, 2))
import zlib
print(zlib.crc32(out.tobytes()))
"""


def test_concurrent_processes_with_an_empty_cache(tmp_path: Path) -> None:
    """Both compile, both write, both are right; a third finds everything."""
    environment = {**os.environ, "HYBRID_MOE_CACHE_DIR": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FORWARD],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    third = run_script(_FORWARD, HYBRID_MOE_CACHE_DIR=str(tmp_path / "cache"))
    assert third.returncode == 0, third.stderr
    assert results[0][0] == results[1][0] == third.stdout != ""
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == entries
    assert "compiled" not in third.stderr
    assert all(path.suffix == ".o" for path in entries)


def test_a_cached_start_imports_no_compiler() -> None:
    """Numba's front end takes longer to import than everything else together."""
    drivers.addresses()  # the cache is warm from here on
    result = run_script(
        """
import sys
from hybrid_moe.cpu_kernels import drivers, layer
assert set(drivers.addresses()) >= {"work", "pack_strips"}
assert all(drivers.addresses().values())
print([name for name in sys.modules if name.split(".")[0] in ("numba", "torch")])
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_changed_driver_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key covers the source of every driver module."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "some_driver.py"
    module.write_text("A = 1\n")
    first = native._source_digest(["some_driver"])
    assert native._source_digest(["some_driver"]) == first
    module.write_text("A = 2\n")
    assert native._source_digest(["some_driver"]) != first
    with pytest.raises((RuntimeError, ModuleNotFoundError), match="no_such_driver"):
        native._source_digest(["no_such_driver"])
