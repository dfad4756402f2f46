"""The object cache, its index by sources, dumps, and a start without a compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hybrid_moe import binary_cache as cache
from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.dsl.emit import I32, Emit, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE
from hybrid_moe.cpu_kernels.jit import compile, sources
from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions, emit_object
from hybrid_moe.cpu_kernels.kernels import library
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


def test_a_function_that_is_not_there(directory: Path) -> None:
    with pytest.raises(RuntimeError, match=r"label.*nothing"):
        compile_functions(_text(1), TARGET, ["answer", "nothing"], "label")


# the index: sources -> object


def _object(value: int, key: str, made: list[int] | None = None) -> bytes:
    """The object of `_text(value)`, looked up by `key`; `made` collects what had to be made."""

    def make() -> str:
        if made is not None:
            made.append(value)
        return _text(value)

    return emit_object(make, TARGET, "answer", sources=key)


def _names(directory: Path) -> tuple[set[str], set[str]]:
    """Objects and index entries."""
    objects, entries = ({p.name for p in directory.glob(f"*.{end}")} for end in ("o", "index"))
    return objects, entries


def test_known_sources_need_no_ir(directory: Path, compilations: list[str]) -> None:
    made: list[int] = []
    first = _object(1, "one", made)
    assert _object(1, "one", made) == _object(2, "one", made) == first and made == [1]
    assert _object(2, "two", made) != first and made == [1, 2]
    objects, entries = _names(directory)
    assert len(compilations) == len(objects) == len(entries) == 2


def test_other_sources_of_the_same_ir_share_its_object(
    directory: Path, compilations: list[str]
) -> None:
    """A comment that changes does not cost a compilation."""
    made: list[int] = []
    assert _object(1, "before", made) == _object(1, "after", made)
    assert made == [1, 1]
    assert emit_object(_text(1), TARGET, "answer") == _object(1, "after", made)
    objects, entries = _names(directory)
    assert (len(compilations), len(objects), len(entries)) == (1, 1, 2)


def test_the_index_is_per_target_and_pass_list(directory: Path) -> None:
    made: list[int] = []
    _object(1, "key", made)
    for target, program in (
        (Target("x86-64-v2" if TARGET.cpu == "" else ""), False),
        (TARGET, True),
    ):
        index = set(_names(directory)[1])
        emit_object(lambda: _text(1), target, "answer", sources="key", program=program)
        assert len(_names(directory)[1] - index) == 1


@pytest.mark.parametrize("which", ["index", "o", "both"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_index(damage: str, which: str, directory: Path, compilations: list[str]) -> None:
    """The right object comes back, and the cache is whole again."""
    made: list[int] = []
    good = _object(3, "key", made)
    whole = {path: path.read_bytes() for path in directory.iterdir()}
    for path, blob in whole.items():
        if which in ("both", path.suffix[1:]):
            bad = {"flip": blob[:-2] + bytes([blob[-2] ^ 1]) + blob[-1:], "truncate": blob[:40]}
            path.unlink() if damage == "remove" else path.write_bytes(bad.get(damage, b""))
    assert _object(3, "key", made) == good
    assert made == [3, 3]
    assert len(compilations) == (1 if which == "index" else 2)
    assert {path: path.read_bytes() for path in directory.iterdir()} == whole


def test_an_index_entry_of_an_object_that_is_gone(directory: Path) -> None:
    """It is replaced, whatever it names."""
    good = _object(3, "key")
    (entry,) = directory.glob("*.index")
    right = entry.read_bytes()
    cache.write(entry.name, b"0" * 64 + b".o")
    assert _object(3, "key") == good and entry.read_bytes() == right


def test_the_source_digest(tmp_path: Path) -> None:
    """It changes with every file of the folders and with its name, and with nothing else."""
    package, formats = folders = tmp_path / "package", tmp_path / "formats"
    (package / "room").mkdir(parents=True)
    formats.mkdir()
    files = [package / "a.py", package / "room" / "b.py", formats / "c.py"]
    for file in files:
        file.write_text("A = 1\n")

    def digest(before: float = 2e12) -> str | None:
        sources._content_digest.cache_clear()
        return sources.source_digest(folders, before)

    seen = {digest()}
    (package / "notes.txt").write_text("no source")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("compiled from a.py")
    assert {digest()} == seen
    (package / "b.pyc").write_text("has no source")
    assert digest() not in seen
    seen.add(digest())
    for file in files:
        file.write_text("A = 2\n")
        assert digest() not in seen
        seen.add(digest())
    files[0].rename(package / "d.py")
    assert digest() not in seen | {None}
    assert digest(before=0) is None, "a file has changed since it was imported"
    assert sources.source_digest((tmp_path / "nowhere",), 2e12) is None


def test_a_file_that_took_the_place_of_an_imported_one(tmp_path: Path) -> None:
    """Archives and installers keep the time of a file's content; its place is new all the same."""
    file = tmp_path / "a.py"
    file.write_text("A = 1\n")
    imported = file.stat().st_ctime
    assert sources.source_digest((tmp_path,), imported) is not None
    time.sleep(0.02)  # more than a tick of the clock of files
    new = tmp_path / "new"
    new.write_text("A = 2\n")
    os.utime(new, (0, 0))
    new.rename(file)
    assert sources.source_digest((tmp_path,), imported) is None


def test_the_time_of_the_import_is_before_everything_that_is_read() -> None:
    script = """
import sys
import time
before = time.time()
import hybrid_moe
print(*sorted(name for name in sys.modules if name.startswith("hybrid_moe")))
between = time.time()
from hybrid_moe.cpu_kernels.jit import sources
print(before <= sources.IMPORTED_AT <= between)
"""
    result = run_script(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["hybrid_moe", "hybrid_moe.imported", "True"]


def test_the_digest_covers_what_is_imported() -> None:
    """Every module that takes part in making IR is among the hashed files: all that are imported
    but the package itself, its locks, and the cache that the hash is for."""
    result = run_script(
        """
import sys
from pathlib import Path
import hybrid_moe.cpu_kernels.kernels.library
from hybrid_moe.cpu_kernels.drivers import drivers_ir
from hybrid_moe.cpu_kernels.jit import sources
drivers_ir()
for name, module in sorted(sys.modules.items()):
    if name.startswith("hybrid_moe"):
        if not set(sources.FOLDERS) & set(Path(module.__file__).parents):
            print(name)
"""
    )
    assert result.returncode == 0, result.stderr
    others = {"binary_cache", "imported", "locks"}
    assert set(result.stdout.split()) == {"hybrid_moe"} | {f"hybrid_moe.{name}" for name in others}


def test_a_tier_that_only_has_a_name_of_ours(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests change tiers: another tier of the same name never gets the cached kernels."""
    monkeypatch.setattr(library, "source_key", lambda what: f"the same sources|{what}")
    library.kernel_set.cache_clear()
    library.kernel_set("BF16", PORTABLE)
    before = _names(directory)
    assert [len(names) for names in before] == [1, 1]

    def forgets(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
        return accumulator

    other = dataclasses.replace(PORTABLE, lowerings={"pair_dot": forgets})
    library.kernel_set("BF16", other)
    library.kernel_set("BF16", dataclasses.replace(PORTABLE, rewrite=lambda text: text + "\n"))
    objects, entries = _names(directory)
    assert len(objects) == 3 and entries == before[1]
    library.kernel_set.cache_clear()
    monkeypatch.setattr(library, "build_module", None)  # the real one needs no IR
    library.kernel_set("BF16", PORTABLE)
    library.kernel_set.cache_clear()


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
    _object(9, "key")
    monkeypatch.setenv("HYBRID_MOE_DUMP", f"{kind}{separator}{tmp_path / 'new' / 'dumps'}")
    dump = tmp_path / "new" / "dumps" / f"answer.{suffix}"
    assert _answer(9) == 9
    assert content in dump.read_text()
    dump.unlink()
    _object(9, "key")
    assert content in dump.read_text()


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
from hybrid_moe.formats.mx import MXFP4
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
            cwd=Path(__file__).parents[3],
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
    assert {path.suffix for path in entries} <= {".o", ".index"}


def test_threads_that_need_the_drivers_at_once_compile_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both_inside = threading.Barrier(2)
    compiled = []

    def compile_slowly(*arguments: object, **options: object) -> dict[str, int]:
        compiled.append(arguments)
        with contextlib.suppress(threading.BrokenBarrierError):  # nobody else comes
            both_inside.wait(timeout=0.5)
        return {"work": len(compiled)}

    monkeypatch.setattr(drivers, "_compiled", functools.lru_cache(drivers._compiled.__wrapped__))
    monkeypatch.setattr(drivers, "compile_functions", compile_slowly)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(drivers.addresses) for _ in range(2)]
    assert [future.result() for future in found] == [{"work": 1}] * 2
    assert len(compiled) == 1


def test_a_cached_start_imports_no_compiler(tmp_path: Path) -> None:
    """Neither what translates drivers nor their sources."""
    script = """
import sys
from hybrid_moe.cpu_kernels import drivers, layer
assert set(drivers.addresses()) >= {"work", "publish_word"}
assert all(drivers.addresses().values())
heavy = {"numba", "torch", "hybrid_moe.cpu_kernels.jit.translate", drivers.__name__ + ".worker"}
print(sorted(heavy & set(sys.modules)))
"""
    runs = [run_script(script, HYBRID_MOE_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert "translate" in runs[0].stdout
    assert runs[1].stdout.strip() == "[]"
