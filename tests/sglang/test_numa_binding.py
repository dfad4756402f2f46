"""Whether SGLang has bound a process to one NUMA node, on described machines; no SGLang."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from hybrid_moe.cpu_kernels.pool.affinity import BINDING_VARIABLES
from hybrid_moe.cpu_kernels.pool.topology import allowed_cpus
from hybrid_moe.integrations.sglang import numa_binding
from hybrid_moe.integrations.sglang.numa_binding import AUTO_BIND, Machine, asked_for, narrowed

GIB = 1 << 30


def machine(
    nodes: int,
    cores: int,
    process: set[int] | None = None,
    server: set[int] | None = None,
    bound: tuple[int, ...] = (),
    gib: int = 256,
) -> Machine:
    """`nodes` nodes of `cores` processors and `gib` GiB each; None stands for all processors."""
    everything = frozenset(range(nodes * cores))
    return Machine(
        nodes={n: frozenset(range(n * cores, (n + 1) * cores)) for n in range(nodes)},
        memory=dict.fromkeys(range(nodes), gib * GIB),
        server=everything if server is None else frozenset(server),
        process=everything if process is None else frozenset(process),
        bound=frozenset(bound),
    )


TWO_SOCKETS = machine(2, 32, process=set(range(32, 64)), bound=(1,))

BOUND: dict[str, tuple[Machine, str]] = {
    "two_sockets": (
        TWO_SOCKETS,
        "NUMA node 1 of 2: 32 of 64 processors, 256 of 512 GiB of memory",
    ),
    "processors_only": (
        machine(2, 32, process=set(range(32))),
        "NUMA node 0 of 2: 32 of 64 processors, 512 of 512 GiB of memory",
    ),
    "four_nodes_per_socket": (
        machine(8, 16, process=set(range(32, 48)), bound=(2,), gib=96),
        "NUMA node 2 of 8: 16 of 128 processors, 96 of 768 GiB of memory",
    ),
    "a_container_with_half_of_each_node": (
        machine(2, 8, process=set(range(4)), server={0, 1, 2, 3, 8, 9, 10, 11}, bound=(0,)),
        "NUMA node 0 of 2: 4 of 8 processors, 256 of 512 GiB of memory",
    ),
}

FREE: dict[str, Machine] = {
    "one_node": machine(1, 16),
    "all_of_two": machine(2, 8),
    "a_part_of_both": machine(2, 8, process={0, 1, 8}),
    "a_server_started_on_one_node": machine(2, 8, process=set(range(8)), server=set(range(8))),
    "a_server_started_on_some_of_it": machine(2, 8, process={1, 2}, server={1, 2, 3}),
    "no_nodes": Machine({}, {}, frozenset({0}), frozenset({0})),
    "a_node_of_memory_only": Machine(
        {0: frozenset(range(8)), 1: frozenset()}, {0: GIB, 1: GIB},
        frozenset(range(8)), frozenset(range(8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_a_process_on_one_node_of_several(name: str) -> None:
    described, text = BOUND[name]
    assert str(narrowed(described)) == text


@pytest.mark.parametrize("name", FREE)
def test_a_process_that_nothing_narrows(name: str) -> None:
    assert narrowed(FREE[name]) is None


@pytest.mark.parametrize(
    ("numa_node", "environ", "who"),
    [
        (None, {}, None),
        (None, {AUTO_BIND: "1"}, None),
        (None, {AUTO_BIND: "true"}, None),
        (None, {AUTO_BIND: "0"}, "who started it"),
        (None, {AUTO_BIND: "False"}, "who started it"),
        ([1], {}, "--numa-node"),
        ([1], {AUTO_BIND: "0"}, "--numa-node"),
    ],
)
def test_who_wanted_it(numa_node: Any, environ: dict[str, str], who: str | None) -> None:
    found = asked_for(numa_node, environ)
    assert (found is None) == (who is None)
    assert who is None or who in (found or "")


class FakeSystem:
    """Remembers what would be set for this and the main thread; `denied` calls fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, denied: str = "") -> None:
        self.affinity: frozenset[int] | None = None
        self.policy: int | None = None
        self.denied = denied
        monkeypatch.setattr(os, "sched_setaffinity", self.set_affinity)
        monkeypatch.setattr(numa_binding, "_call", self.call)

    def set_affinity(self, process: int, cpus: frozenset[int]) -> None:
        if self.denied == "sched_setaffinity":
            raise PermissionError(1, "Operation not permitted")
        assert process in (0, os.getpid())
        self.affinity = cpus

    def call(self, name: str, mode: int, *rest: Any) -> None:
        if self.denied == name:
            raise OSError(1, "Operation not permitted")
        assert name == "set_mempolicy"
        self.policy = mode


@pytest.fixture(autouse=True)
def default_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTO_BIND, raising=False)


def test_what_sglang_took_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = FakeSystem(monkeypatch)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        assert numa_binding.widen(None, TWO_SOCKETS)
    assert system.affinity == frozenset(range(64)) and system.policy == 0
    (line,) = caplog.messages
    assert "bound this process to NUMA node 1 of 2: 32 of 64 processors, 256 of 512 GiB" in line
    assert f"{AUTO_BIND}=0" in line


def test_no_policy_is_set_where_none_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeSystem(monkeypatch)
    assert numa_binding.widen(None, BOUND["processors_only"][0])
    assert system.affinity == frozenset(range(64)) and system.policy is None


def test_what_somebody_asked_for_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = FakeSystem(monkeypatch)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        assert not numa_binding.widen([1], TWO_SOCKETS)
    assert system.affinity is None and system.policy is None
    (line,) = caplog.messages
    assert "32 of 64 processors, 256 of 512 GiB" in line
    assert "--numa-node wanted" in line and "about 1/2 of the machine's memory bandwidth" in line


@pytest.mark.parametrize("denied", ["sched_setaffinity", "set_mempolicy"])
def test_what_cannot_be_undone_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, denied: str
) -> None:
    system = FakeSystem(monkeypatch, denied)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        assert not numa_binding.widen(None, TWO_SOCKETS)
    assert system.affinity is None
    (line,) = caplog.messages
    assert "Operation not permitted" in line and f"{AUTO_BIND}=0" in line
    assert "about 1/2 of the machine's memory bandwidth" in line


def test_an_ordinary_process_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = FakeSystem(monkeypatch)
    with caplog.at_level(logging.INFO, logger="hybrid_moe"):
        for described in FREE.values():
            assert not numa_binding.widen(None, described)
    assert system.affinity is None and system.policy is None and not caplog.messages


@pytest.mark.parametrize("builder", ["main_thread", "another_thread"])
def test_pools_see_the_processors_that_were_taken_back(builder: str) -> None:
    """In a process that was narrowed to one processor as numactl does, whichever thread of it
    builds the model, and whichever asks."""
    cpus = allowed_cpus()
    if len(cpus) < 2:
        pytest.skip("this process has one processor: nothing can be taken from it")
    code = f"""
        import json, os, threading
        from hybrid_moe.cpu_kernels.pool.topology import allowed_cpus
        from hybrid_moe.integrations.sglang.numa_binding import Machine, widen

        first, *rest = {list(cpus)}
        nodes = {{0: frozenset([first]), 1: frozenset(rest)}}
        machine = Machine(nodes, {{}}, nodes[0] | nodes[1], nodes[0])
        os.sched_setaffinity(0, nodes[0])
        seen = []

        def build():
            seen.append(allowed_cpus())
            assert widen(None, machine)
            seen.extend((allowed_cpus(), os.sched_getaffinity(0)))

        if {builder == "main_thread"}:
            build()
        else:
            thread = threading.Thread(target=build)
            thread.start()
            thread.join()
        print(json.dumps([*map(list, seen), allowed_cpus()]))
    """
    environ = {n: v for n, v in os.environ.items() if n not in (*BINDING_VARIABLES, AUTO_BIND)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, *after = json.loads(done.stdout)
    assert before == [cpus[0]] and after == [list(cpus)] * 3


def test_this_machine() -> None:
    here = numa_binding.read_machine()
    assert here.process == frozenset(allowed_cpus()) <= here.server
    assert all(nbytes > 0 for nbytes in here.memory.values()) or not here.nodes
    assert numa_binding._bound_nodes() <= set(here.nodes)
