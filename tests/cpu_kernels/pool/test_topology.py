"""What the process may use, read from the kernel's files and from an OpenMP runtime."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.pool import affinity, cgroups, topology
from hybrid_moe.logs import warn_once
from tests.machines import Machine


@pytest.fixture(autouse=True)
def _told_anew() -> Iterator[None]:
    """What is logged once in a process is logged once in a test."""
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", (0,)),
        ("0-3,8\n", (0, 1, 2, 3, 8)),
        ("2,4-5", (2, 4, 5)),
        ("\n", ()),
        ("0-1,64-66", (0, 1, 64, 65, 66)),
        ("4-5,0-1,1", (0, 1, 4, 5)),
    ],
)
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert topology.parse_cpu_list(text) == cpus


# control groups ---------------------------------------------------------------------------------

_BOX = "0::/box/job\n5:cpuacct,cpu:/job\n4:memory:/elsewhere\nno line of this file\n"
_V1 = "cpu/job/cpu.cfs_"


def _groups(files: dict[str, str]) -> dict[str, str | None]:
    return {"proc/self/cgroup": _BOX, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"box/cpu.max": "400000 50000\n"}, 8.0),
        ({"box/cpu.max": "400000 100000\n", "box/job/cpu.max": "250000 100000\n"}, 2.5),
        ({"box/cpu.max": "50000 100000\n", "box/job/cpu.max": "max 100000\n"}, 0.5),
        ({"other/cpu.max": "50000 100000\n", "memory/elsewhere/cpu.max": "1 1"}, None),
        ({"unified/box/cpu.max": "300000 100000\n"}, 3.0),
        ({f"{_V1}quota_us": "-1\n", f"{_V1}period_us": "100000\n"}, None),
        ({f"{_V1}quota_us": "250000\n", f"{_V1}period_us": "100000\n"}, 2.5),
        ({"cpuacct,cpu/job/cpu.cfs_quota_us": "250000\n",
          "cpuacct,cpu/job/cpu.cfs_period_us": "100000\n"}, 2.5),
    ],
    ids=str,
)  # fmt: skip
def test_cgroup_quota(
    files: dict[str, str],
    limit: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Machine({0: "0"}, files=_groups(files)).pretend(tmp_path, monkeypatch)
    assert topology.cgroup_cpu_limit() == limit
    assert not caplog.records


@pytest.mark.parametrize("text", ["nonsense", "100000", "1 2 3", "0 100000", "100000 0", "-5 100"])
def test_a_quota_that_we_do_not_know_is_told_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = _groups({"box/cpu.max": text, "cpu.max": "200000 100000"})
    Machine({0: "0"}, files=files).pretend(tmp_path, monkeypatch)
    assert [topology.cgroup_cpu_limit() for _ in range(3)] == [2.0] * 3
    assert [text in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("quota", "affinity", "cores"), [(None, 6, 6), (1.5, 6, 2), (0.1, 6, 1), (8, 3, 3)]
)
def test_usable_cores(
    quota: float | None, affinity: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine({0: f"0-{affinity - 1}"}, quota=quota).pretend(tmp_path, monkeypatch)
    assert topology.usable_cores() == cores


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, (0, 1, 2, 3)),
        ({"box/job/cpuset.cpus.effective": "\n", "box/cpuset.cpus.effective": "1-2\n"}, (1, 2)),
        ({"box/job/cpuset.cpus.effective": "3\n", "cpuset.cpus.effective": "0-3\n"}, (3,)),
        ({"cpuset.cpus": "2-3\n"}, (2, 3)),
    ],
    ids=str,
)
def test_cpuset(
    files: dict[str, str], cpus: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine({0: "0-3"}, files=_groups(files)).pretend(tmp_path, monkeypatch)
    assert cgroups.cpuset() == cpus


# NUMA nodes -------------------------------------------------------------------------------------


def test_numa_nodes_within_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {0: "0-3", 1: "4-7", 10: "8-9"}
    Machine(nodes, mask="2,3,8").pretend(tmp_path, monkeypatch)
    assert topology.numa_nodes() == {0: (2, 3), 10: (8,)}
    (tmp_path / "sys/devices/system/node/node10/cpulist").unlink()
    assert topology.numa_nodes() == {0: (2, 3, 8)}  # a processor of no node counts to the first
    monkeypatch.setattr(sysfiles, "ROOT", tmp_path / "nowhere")
    assert topology.numa_nodes() == {0: (2, 3, 8)}


# the process's processors -----------------------------------------------------------------------

FOUR = frozenset(range(4))
ALONE = [frozenset({cpu}) for cpu in range(4)]


@pytest.mark.parametrize(
    ("variables", "main", "runtimes", "expected"),
    [
        pytest.param((), {2}, [(ALONE, 4)], {2}, id="no binding asked for: the mask was meant"),
        pytest.param(("OMP_PROC_BIND",), {0}, [(ALONE, 4)], FOUR, id="bound to the first place"),
        pytest.param(("OMP_PLACES",), {0}, [([], 4), (ALONE, 4)], FOUR, id="the second runtime's"),
        pytest.param(("OMP_PROC_BIND",), {0, 1}, [(ALONE, 4)], {0, 1}, id="set by the program"),
        pytest.param(("OMP_PROC_BIND",), {5}, [(ALONE, 4)], {5}, id="set to what is no place"),
        pytest.param(("OMP_PROC_BIND",), FOUR, [(ALONE, 4)], FOUR, id="another thread is bound"),
        pytest.param(
            ("OMP_PROC_BIND",), {0, 1}, [([frozenset({0, 1}), frozenset({2, 3})], 4)], FOUR,
            id="a place is a core",
        ),
        pytest.param(
            ("GOMP_CPU_AFFINITY",), {1}, [([frozenset({1})], 8)], set(range(8)),
            id="places are fewer than the process had, which is its cpuset",
        ),
        pytest.param(
            ("GOMP_CPU_AFFINITY",), {1}, [([frozenset({1}), frozenset({2})], 3)], {1, 2},
            id="fewer than the process had, and that was less than its cpuset",
        ),
    ],
)  # fmt: skip
def test_processors_of_the_process(
    variables: tuple[str, ...],
    main: set[int],
    runtimes: list[tuple[list[frozenset[int]], int]],
    expected: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Machine({0: "0-7"}).pretend(tmp_path, monkeypatch)
    for name in variables:
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: main if pid else {7})
    monkeypatch.setattr(affinity, "_openmp_places", lambda: [r for r in runtimes if r[0]])
    assert set(topology.allowed_cpus()) == expected


def test_an_inherited_binding_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing tells the mask of a bound parent from one that was meant."""
    Machine({0: "0-7"}, mask="5").pretend(tmp_path, monkeypatch)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(affinity, "_openmp_places", list)
    assert topology.allowed_cpus() == topology.allowed_cpus() == (5,)
    assert len(caplog.records) == 1 and "OMP_PROC_BIND" in caplog.text


PROBE = """
import json, os
import torch
from hybrid_moe.cpu_kernels.pool.topology import allowed_cpus
print(json.dumps([sorted(os.sched_getaffinity(0)), allowed_cpus()]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
@pytest.mark.parametrize(
    ("given", "env", "bound"),
    [
        (2, {"OMP_PROC_BIND": "close"}, True),
        (2, {"GOMP_CPU_AFFINITY": "{last}"}, True),
        (2, {}, False),
        (1, {"OMP_PROC_BIND": "true"}, True),
    ],
)
def test_the_mask_at_the_start_counts(given: int, env: dict[str, str], bound: bool) -> None:
    """With torch's own OpenMP runtime; the mask that a `taskset` would give is respected."""
    start = sorted(os.sched_getaffinity(0))[-given:]
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **{k: v.format(last=start[-1]) for k, v in env.items()}},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, start),
    )
    main, allowed = json.loads(done.stdout)
    assert allowed == start
    assert (len(main) == 1) == bound


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_without_affinity_calls(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sandboxes refuse them: every processor counts, threads are not bound, both are told once."""
    Machine({0: "0-3"}).pretend(tmp_path, monkeypatch)

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(affinity.os, "sched_getaffinity", refuse)
    monkeypatch.setattr(affinity.os, "sched_setaffinity", refuse)
    with caplog.at_level(logging.WARNING):
        assert [topology.allowed_cpus() for _ in range(3)] == [(0, 1, 2, 3)] * 3
        assert affinity.bound_to() is None
        for cpu in range(3):
            affinity.bind_thread((cpu,))
    assert len(caplog.records) == 2
    (tmp_path / "sys/devices/system/cpu/online").unlink()
    monkeypatch.setattr(affinity.os, "cpu_count", lambda: None)
    assert topology.allowed_cpus() == (0,)
