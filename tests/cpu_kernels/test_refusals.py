"""What the system refuses: threads, memory of a node, its own architecture, sources, options."""

from __future__ import annotations

import inspect
import logging
import platform
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer

from hybrid_moe import sysfiles
from hybrid_moe.cli.errors import readable
from hybrid_moe.cpu_kernels import drivers, memory
from hybrid_moe.cpu_kernels import layer as layer_module
from hybrid_moe.cpu_kernels.jit import compile
from hybrid_moe.cpu_kernels.jit.driver import Driver
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool import group as group_module
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch
from tests.machines import pretend_processors

CASE = Case.random(MXFP4, 64, 96)
BATCH = random_batch(3, CASE.H, CASE.E, 2)


# threads


def _workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("hybrid_moe-")}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`room.threads` more may start."""
    left = SimpleNamespace(threads=0)
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name.startswith("hybrid_moe-"):
            if left.threads == 0:
                raise RuntimeError("can't start new thread")
            left.threads -= 1
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    pretend_processors(monkeypatch)
    return left


@pytest.mark.parametrize("possible", [0, 1, 6])
def test_too_few_threads(possible: int, room: SimpleNamespace) -> None:
    """The message says how many there may be, nothing stays, and that many work."""
    node = (min(numa_nodes()),)
    layer = CASE.layer(pool=PoolConfig(8, 1, node))
    before = _workers()
    for _ in range(3):
        room.threads = possible
        with pytest.raises(OSError, match=f"at most {possible + 1} ") as caught:
            layer.forward(*BATCH)
        assert f"start {possible} of the 7 threads" in str(caught.value)
        assert _workers() == before
    room.threads = possible
    fewer = CASE.layer(pool=PoolConfig(possible + 1, 1, (*node,)))
    expected = CASE.layer().forward(*BATCH)
    assert np.array_equal(fewer.forward(*BATCH), expected)
    room.threads = 7
    assert np.array_equal(layer.forward(*BATCH), expected)
    for config in (layer.pool, fewer.pool):
        if (group := group_module._groups.pop(config, None)) is not None:
            group.stop()


def test_no_thread_for_the_background(room: SimpleNamespace) -> None:
    """The group stays as it was: callers work."""
    group = PoolGroup(PoolConfig(1))
    layer = CASE.layer()
    layer._group = group
    with pytest.raises(OSError, match="start 0 of the 1 threads"):
        group.start_background_worker()
    assert group.caller_works
    assert np.array_equal(layer.forward(*BATCH), CASE.layer().forward(*BATCH))
    group.stop()


def test_the_command_line_says_it_in_one_paragraph(
    room: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    @readable
    def command() -> None:
        PoolGroup(PoolConfig(3))

    with pytest.raises(typer.Exit) as exit:
        command()
    assert exit.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hybrid-moe: the system lets this process start 0 of the 2 threads")


# memory


def _meminfo(root: Path, node: int, **kib: int) -> None:
    folder = root / "sys/devices/system/node"
    (folder / f"node{node}").mkdir(parents=True)
    lines = [f"Node {node} {name.replace('_', '(')}: {size:8} kB\n" for name, size in kib.items()]
    text = "".join(line.replace("(file:", "(file):") for line in lines)
    (folder / f"node{node}" / "meminfo").write_text(text + f"Node {node} HugePages_Total:     0\n")


MPOL_PREFERRED, MPOL_INTERLEAVE = 1, 3  # linux/mempolicy.h


@pytest.mark.parametrize(
    ("nodes", "policy", "words"),
    [((65,), MPOL_PREFERRED, [0, 2, 0]), ((0, 3, 64), MPOL_INTERLEAVE, [9, 1, 0])],
)
def test_nodes_are_asked_for_and_not_bound(
    nodes: tuple[int, ...], policy: int, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPOL_BIND on a node that is too small ends with the kernel's killing a process."""
    calls: list[tuple[Any, ...]] = []

    def syscall(*arguments: Any) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(memory, "_libc", lambda: SimpleNamespace(syscall=syscall))
    arena = Arena(5 << 20, nodes)
    ((number, address, nbytes, mode, mask, *_),) = calls
    assert number.value == {"x86_64": 237, "aarch64": 235}[platform.machine()]
    assert (address.value, nbytes.value) == (arena.address, 5 << 20)
    assert mode.value == policy
    assert list(mask)[:3] == words


def test_mbind_takes_the_nodes() -> None:
    """On this machine: the pages are there and the call was not refused."""
    arena = Arena(4 << 20, tuple(numa_nodes()))
    arena.bytes[:] = 7
    assert int(arena.bytes.sum(dtype=np.int64)) == 7 * (4 << 20)


@pytest.mark.parametrize("free", [{"MemFree": 100}, {"MemFree": 60, "Active_file": 60}, {}])
def test_a_node_with_too_little_memory(
    free: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said once for each node, with what is there and what is wanted of it; the page cache counts
    as free; silence where the system does not tell."""
    _meminfo(tmp_path, 0, MemTotal=10**9, **{k: v << 20 for k, v in free.items()})
    monkeypatch.setattr(sysfiles, "ROOT", tmp_path)
    monkeypatch.setattr(memory, "_told_nodes", set())
    monkeypatch.setattr(memory, "_libc", lambda: SimpleNamespace(syscall=lambda *_: 0))
    left = sum(free.values()) << 30
    with caplog.at_level(logging.WARNING, logger=memory.__name__):
        memory._place(0, left, (0,))
        memory._place(0, left, (1,))
        memory._place(0, 2 * left, (0, 1))
        assert not caplog.records
        for _ in range(3):
            memory._place(0, 2 * left + (2 << 30), (0, 1))
            memory._place(0, left + (1 << 30), (0,))
    if not free:
        assert not caplog.records
        return
    (record,) = caplog.records
    gib = left >> 30
    assert f"node 0 has {gib}.0 GiB left for {gib + 1}.0 GiB" in record.getMessage()


# the machine


@pytest.mark.parametrize(("machine", "maxsize"), [("riscv64", 2**63 - 1), ("x86_64", 2**31 - 1)])
def test_a_machine_that_nothing_is_written_for(
    machine: str, maxsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, before anything is compiled: LLVM would end the process."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(drivers.sys, "maxsize", maxsize)
    monkeypatch.setattr(drivers, "compile_functions", None)
    wanted = pytest.raises(NotImplementedError, match=rf"x86_64 and aarch64.*{machine}")
    for use in (
        lambda: ExpertLayer(MXFP4, 1, 32, 32, pool=PoolConfig(1)),
        lambda: PoolGroup(PoolConfig(1)),
        drivers._compiled.__wrapped__,
    ):
        with wanted:
            use()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(drivers.sys, "maxsize", 2**63 - 1)
    drivers.check_machine()


def test_an_unknown_llvm_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: list[str] = []
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compile.llvm, "set_option", lambda name, option: options.append(option))
    monkeypatch.setattr(compile.llvm, "llvm_version_info", (99, 0, 0))
    compile._knows_combiner_option.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=compile.__name__):
            for _ in range(3):
                with compile._in_written_order():
                    pass
        (record,) = caplog.records
        assert "LLVM 99" in record.getMessage() and not options
        compile._knows_combiner_option.cache_clear()
        monkeypatch.setattr(compile.llvm, "llvm_version_info", (20, 1, 0))
        with compile._in_written_order():
            assert options == ["-x86-machine-combiner=0"]
        assert options[1:] == ["-x86-machine-combiner=1"] and len(caplog.records) == 1
    finally:
        compile._knows_combiner_option.cache_clear()


# sources


def test_a_package_without_its_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names what is needed, on the command line, too."""

    def nothing(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", nothing)

    def loop(a: int) -> int:
        return a

    loop.__annotations__["return"] = "int"

    @readable
    def command() -> None:
        _ = Driver(loop).body

    with pytest.raises(ImportError, match=r"install the package with its \.py files"):
        _ = Driver(loop).body
    with pytest.raises(typer.Exit):
        command()
    (line,) = capsys.readouterr().err.splitlines()
    assert loop.__module__ in line


def test_layers_and_groups_are_the_only_users_of_the_machine() -> None:
    """The module that a layer asks is the one that knows what drivers are written for."""
    assert layer_module.check_machine is drivers.check_machine
    assert set(group_module.FUTEX_NUMBERS) == set(memory._SYS_MBIND) == set(drivers.MACHINES)
