"""What `doctor` reads, against files of the kernel's formats."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hybrid_moe import doctor
from hybrid_moe.cpu_kernels.pool import topology


def test_report_of_this_machine() -> None:
    report = doctor.examine(measure_bandwidth=False)
    usable = [tier.name for tier in report.isa.tiers if not tier.missing]
    assert "portable" in usable
    assert report.isa.reason
    assert set(report.cores.cpuset) == os.sched_getaffinity(0)
    assert 1 <= report.cores.available <= len(report.cores.cpuset)
    assert 0 < report.memory.available <= report.memory.total
    assert report.versions["python"] and report.versions["LLVM"] and report.versions["numpy"]
    assert json.loads(json.dumps(report.to_dict()))["processor"] == report.processor


def test_bandwidth_of_every_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_moe.cpu_kernels import bandwidth

    monkeypatch.setattr(bandwidth, "measure_read_bandwidth", lambda threads: 10.0 * threads)
    expected = {1: {1: 10.0}, 4: {1: 10.0, 2: 20.0, 4: 40.0}, 6: {1: 10, 2: 20, 4: 40, 6: 60}}
    assert {cores: doctor.read_bandwidth(cores) for cores in expected} == expected


def test_forced_tier_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MOE_ISA", "portable")
    isa = doctor.read_isa()
    assert isa.chosen == "portable" and "HYBRID_MOE_ISA=portable" in isa.reason
    monkeypatch.setenv("HYBRID_MOE_ISA", "abacus")
    isa = doctor.read_isa()
    assert isa.chosen is None and "abacus" in isa.reason


def test_next_tier_s_lack_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_moe.cpu_kernels.dsl import tiers

    monkeypatch.delenv("HYBRID_MOE_ISA", raising=False)
    monkeypatch.setattr(
        tiers, "host_features", lambda: frozenset({"avx2", "fma", "avxvnni", "avx512f"})
    )
    isa = doctor.read_isa()
    assert isa.chosen == "avx2_vnni"
    assert "avx512, needs avx512bw" in isa.reason and "avx512f," not in isa.reason


CGROUPS = {
    "v2": (
        "0::/a/b\n",
        {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "8192"},
        4096,
    ),
    "v1": (
        "5:cpu,cpuacct:/x\n4:memory:/x\n",
        {"memory/x/memory.limit_in_bytes": "2048", "memory/memory.limit_in_bytes": f"{2**63 - 1}"},
        2048,
    ),
    "container": ("4:memory:/outside/this/mount\n", {"memory/memory.limit_in_bytes": "1024"}, 1024),
    "none": ("0::/\n", {"memory.max": "max"}, None),
    "hidden": ("0::/\n", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_memory_limit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership, files, expected = CGROUPS[name]
    mount = tmp_path / "cgroup"
    for relative, content in files.items():
        (mount / relative).parent.mkdir(parents=True, exist_ok=True)
        (mount / relative).write_text(content + "\n")
    (tmp_path / "self").write_text(membership)
    monkeypatch.setattr(topology, "_CGROUPS", mount)
    monkeypatch.setattr(topology, "_SELF_CGROUP", tmp_path / "self")
    assert doctor.memory_limit() == expected


@pytest.mark.parametrize(
    ("content", "state"), [("always [madvise] never\n", "madvise"), (None, None)]
)
def test_huge_pages(
    content: str | None, state: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "enabled").write_text(content)
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    assert doctor.huge_page_state() == state


def test_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU: 9000\n")
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    assert doctor.processor_name() == "Fast CPU: 9000"
