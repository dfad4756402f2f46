"""What `doctor` reads, against files of the kernel's formats."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hybrid_moe.planning import doctor
from hybrid_moe.planning.machine import memory_of_this_machine
from tests.machines import Machine


def test_report_of_this_machine() -> None:
    report = doctor.machine_report(measure_bandwidth=False)
    usable = [tier.name for tier in report.isa.tiers if not tier.missing]
    assert "portable" in usable
    assert report.isa.reason
    assert set(report.cores.cpuset) == os.sched_getaffinity(0)
    assert 1 <= report.cores.available <= len(report.cores.cpuset)
    assert 0 < report.memory.available <= report.memory.total
    assert report.versions["python"] and report.versions["LLVM"] and report.versions["numpy"]
    assert report.gpu.reason
    assert json.loads(json.dumps(report.to_dict()))["processor"] == report.processor


def test_bandwidth_of_every_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_moe.cpu_kernels.ceilings import bandwidth

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
        tiers, "host_features", lambda: frozenset({"avx2", "f16c", "fma", "avxvnni", "avx512f"})
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
    limits = {f"sys/fs/cgroup/{file}": content + "\n" for file, content in files.items()}
    machine = Machine({0: "0"}, files={"proc/self/cgroup": membership, **limits})
    machine.pretend(tmp_path, monkeypatch)
    memory = doctor.read_memory()
    assert memory.limit == expected
    assert (memory.total, memory.available) == (4 << 20, 2 << 20)
    assert memory_of_this_machine() == (4 << 20 if expected is None else expected)


@pytest.mark.parametrize("text", [None, "", "MemTotal: much\n", "Cached: 0 kB\n"])
def test_memory_that_is_not_told(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C library may know the total; if not, nobody does, and the option is named."""
    Machine({0: "0"}, files={"proc/meminfo": text}).pretend(tmp_path, monkeypatch)
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(doctor.os, "sysconf", pages.__getitem__)
    assert doctor.read_memory().total == 4096000 and doctor.read_memory().available is None

    def refuse(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(doctor.os, "sysconf", refuse)
    assert doctor.read_memory().total is None
    with pytest.raises(ValueError, match="--ram"):
        memory_of_this_machine()


@pytest.mark.parametrize(
    ("content", "state"), [("always [madvise] never\n", "madvise"), (None, None)]
)
def test_huge_pages(
    content: str | None, state: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    Machine({0: "0"}, files={name: content}).pretend(tmp_path, monkeypatch)
    assert doctor.huge_page_state() == state


def test_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: Fast CPU: 9000\n"
    Machine({0: "0"}, files={"proc/cpuinfo": text}).pretend(tmp_path, monkeypatch)
    assert doctor.processor_name() == "Fast CPU: 9000"
