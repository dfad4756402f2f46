"""The directory of the object cache: whose it may be, where it is, how large it gets."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid_moe import binary_cache as cache
from tests.cpu_kernels.jit.test_jit import _answer

os_fstat = os.fstat


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
    owner = os.getuid() or 4321  # root may own it
    monkeypatch.setattr(cache.os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(cache.os, "fstat", lambda fd: _as_of(os_fstat(fd), st_uid=owner))
    _assert_in_memory(directory, compilations, caplog, f"user {owner}")


def _as_of(status: os.stat_result, **changes: int) -> SimpleNamespace:
    """`status` with other fields."""
    fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("owner", ["root", "other"])
@pytest.mark.parametrize("writable", [False, True])
def test_whose_entries_are_executed(
    owner: str,
    writable: bool,
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Root's and this user's, unless others may write to them: an image is often filled by root."""
    assert _answer(12) == 12
    (entry,) = directory.glob("*.o")
    entry.chmod(0o664 if writable else 0o644)
    uid = 0 if owner == "root" else os.geteuid() + 1
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() or 4321)
    monkeypatch.setattr(cache.os, "fstat", lambda fd: _as_of(os_fstat(fd), st_uid=uid))
    assert _answer(12) == 12
    assert len(compilations) == (1 if owner == "root" and not writable else 2)


def test_a_link_in_place_of_the_directory(
    directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever may write to the folder above could lead it anywhere."""
    elsewhere = directory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING, logger=cache.__name__):
        assert [_answer(5), _answer(5)] == [5, 5]
    assert len(compilations) == 2 and not list(elsewhere.iterdir())
    assert "it is a link" in caplog.text and caplog.text.count("cannot be used") == 1


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_an_entry_that_is_no_file(kind: str, directory: Path, compilations: list[str]) -> None:
    assert _answer(13) == 13
    (entry,) = directory.glob("*.o")
    entry.rename(directory / "moved")
    if kind == "link":
        entry.symlink_to("moved")
    elif kind == "fifo":
        os.mkfifo(entry, 0o600)
    else:
        entry.mkdir(mode=0o700)
    assert _answer(13) == 13
    assert len(compilations) == 2


def test_a_directory_that_is_swapped_after_it_was_checked(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read and written lies in the folder that was looked at, whatever has its name now."""
    assert _answer(14) == 14
    checked = cache.check_private
    swapped = directory.with_name("checked")

    def swap(status: os.stat_result) -> None:
        checked(status)
        if directory.exists() and not swapped.exists():
            directory.rename(swapped)
            directory.mkdir(mode=0o777)
            for entry in swapped.glob("*.o"):
                (directory / entry.name).write_bytes(b"somebody else's")

    monkeypatch.setattr(cache, "check_private", swap)
    assert _answer(14) == 14
    assert len(compilations) == 1 and swapped.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "answer", "0" * 64 + ".o/x"])
def test_names_that_are_none(name: str, directory: Path) -> None:
    """An index names an object of this directory, nothing else."""
    directory.mkdir(mode=0o700)
    payload = b"x"
    (directory.parent / "secret").write_bytes(hashlib.sha256(payload).digest() + payload)
    (directory / "answer").write_bytes(hashlib.sha256(payload).digest() + payload)
    assert cache.read(name) is None


def test_the_size_is_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for the longest time goes; nothing that is not ours does."""
    names = [f"{number:064x}.o" for number in range(6)]
    entry_bytes = 32 + 1000
    monkeypatch.setattr(cache, "LIMIT_BYTES", 4 * entry_bytes)
    directory.mkdir(mode=0o700)
    theirs = directory / "notes.txt"
    theirs.write_bytes(bytes(10**6))
    left, new = (directory / f"{name}.{'a' * 16}.tmp" for name in names[:2])
    for file in (left, new):
        file.write_bytes(bytes(5000))
    os.utime(left, (0, 0))
    for name in names[:4]:
        cache.write(name, bytes(1000))
    assert {name for name in names if (directory / name).exists()} == set(names[:4])
    now = time.time()
    for age, name in enumerate(names[:4]):
        os.utime(directory / name, (now - 100 * age, now))  # 3 is the oldest
    assert cache.read(names[3]) == bytes(1000)  # and is used now
    for name in names[4:]:
        cache.write(name, bytes(1000))
    kept = {name for name in names if (directory / name).exists()}
    assert kept == {names[0], names[3], names[4], names[5]}
    assert theirs.exists() and new.exists() and not left.exists()
    cache.write(names[1], bytes(9000))
    assert cache.read(names[1]) == bytes(9000), "the newest stays, whatever its size"


@pytest.mark.parametrize("home", ["none", "root's", "missing"])
def test_a_user_without_a_home(
    home: str,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A user id that the system does not know is like any other cache that cannot be used."""
    for name in ("HYBRID_MOE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache, "_told", set())
    if home == "none":

        def unknown() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(cache.Path, "home", unknown)
    else:
        (tmp_path / "file").touch()
        where = tmp_path / "file" if home == "missing" else Path("/proc")
        monkeypatch.setenv("HOME", str(where))
    with caplog.at_level(logging.WARNING, logger=cache.__name__):
        assert [_answer(15), _answer(15)] == [15, 15]
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "stay in memory" in record.getMessage()


def test_a_read_only_directory_is_read(
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _answer(16) == 16
    monkeypatch.setattr(cache.os, "access", lambda *_, **__: False)  # root may write anywhere
    before = set(directory.iterdir())
    with caplog.at_level(logging.WARNING, logger=cache.__name__):
        assert _answer(16) == 16
        assert len(compilations) == 1 and not caplog.records
        assert [_answer(17), _answer(18)] == [17, 18]
    assert len(compilations) == 3
    (record,) = caplog.records
    assert "not writable" in record.getMessage()
    assert set(directory.iterdir()) == before


def test_a_directory_that_cannot_be_made(
    directory: Path, compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file is in the way")
    _assert_in_memory(directory, compilations, caplog, "Not a directory")


def test_a_read_only_directory(
    directory: Path,
    compilations: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(cache.os, "access", lambda *_, **__: False)  # root may write anywhere
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

    monkeypatch.setattr(cache.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert _answer(8) == 8
    assert "No space left" in caplog.text and compilations
    assert not list(directory.iterdir()), "the temporary file is gone"


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
