"""What the process may use, read from the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_moe.cpu_kernels.pool import topology


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", (0,)),
        ("0-3,8\n", (0, 1, 2, 3, 8)),
        ("2,4-5", (2, 4, 5)),
        ("\n", ()),
        ("0-1,64-66", (0, 1, 64, 65, 66)),
    ],
)
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert topology.parse_cpu_list(text) == cpus


def _point_at(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """Make `files` the cgroup file system of a process in /box/job (v2) and /job (v1 cpu)."""
    (folder / "self").write_text("0::/box/job\n5:cpuacct,cpu:/job\n4:memory:/elsewhere\n")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(topology, "_CGROUPS", folder)
    monkeypatch.setattr(topology, "_SELF_CGROUP", folder / "self")


_V1 = "cpu/job/cpu.cfs_"


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
        ({"cpu.max": "nonsense"}, None),
    ],
    ids=str,
)
def test_cgroup_quota(
    files: dict[str, str], limit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _point_at(monkeypatch, tmp_path, files)
    assert topology.cgroup_cpu_limit() == limit


@pytest.mark.parametrize(
    ("quota", "affinity", "cores"),
    [
        ("max 100000", 6, 6),
        ("150000 100000", 6, 2),
        ("10000 100000", 6, 1),
        ("800000 100000", 3, 3),
    ],
)
def test_usable_cores(
    quota: str, affinity: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _point_at(monkeypatch, tmp_path, {"cpu.max": quota})
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda _: set(range(affinity)))
    assert topology.usable_cores() == cores


def test_numa_nodes_within_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, cpus in (("node0", "0-3"), ("node1", "4-7"), ("node10", "8-9")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(topology, "_NODES", tmp_path)
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda _: {2, 3, 8})
    assert topology.numa_nodes() == {0: (2, 3), 10: (8,)}
    monkeypatch.setattr(topology, "_NODES", tmp_path / "none")
    assert topology.numa_nodes() == {0: (2, 3, 8)}
