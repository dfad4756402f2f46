"""What this machine offers to hybrid_moe: processor, tiers, cores and limits, memory, versions.

Plain data, from psutil, /proc, /sys and the package metadata; `hybrid-moe doctor` prints it. A fact
that the kernel does not tell (a container hides files) is None, never a guess.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from hybrid_moe import sysfiles

logger = logging.getLogger(__name__)
Fact = TypeVar("Fact")

PACKAGES = (
    "torch", "numpy", "llvmlite", "safetensors", "transformers", "sglang", "nvidia-cutlass-dsl",
)  # fmt: skip


@dataclass(frozen=True)
class TierStatus:
    """An ISA tier and what the processor lacks for it (nothing: it is usable)."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Isa:
    """Tiers, least capable first, and the one that kernels are compiled for.

    `chosen` is None where the choice is an error; `reason` says why in either case.
    """

    tiers: tuple[TierStatus, ...]
    chosen: str | None
    reason: str


@dataclass(frozen=True)
class Cores:
    """Logical processors: of the machine, of this process's cpuset, and the cgroup's quota.

    Attributes:
        online: logical processors of the machine.
        physical: cores of the machine, None if the kernel does not tell.
        cpuset: ids that this process may run on.
        quota: processors' worth of time that the cgroup allows, None for no limit.
        available: the most threads that pools may have: the cpuset, cut to the quota.
        numa_nodes: node id -> its logical processors in the cpuset.
        threads, pools: what is used where nothing else is asked for.
        bound: whether these threads have a processor each, see `cpu_kernels/pool/pinning.py`.
    """

    online: int
    physical: int | None
    cpuset: tuple[int, ...]
    quota: float | None
    available: int
    numa_nodes: dict[int, tuple[int, ...]]
    threads: int
    pools: int
    bound: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM, None where nothing tells; `limit` is the cgroup's (None for none); state of
    transparent huge pages."""

    total: int | None
    available: int | None
    limit: int | None
    huge_pages: str | None


@dataclass(frozen=True)
class GpuPath:
    """Whether hot experts are computed by kernels on a GPU, and why or why not; and what became of
    a trial to page-lock memory for the copies of experts that move (None without a GPU)."""

    usable: bool
    reason: str
    page_locking: str | None


@dataclass(frozen=True)
class MachineReport:
    """All of it. `bandwidth`: threads -> GB/s read from memory, empty where not measured."""

    processor: str
    architecture: str
    features: tuple[str, ...]
    isa: Isa
    cores: Cores
    memory: Memory
    gpu: GpuPath
    bandwidth: dict[int, float]
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def machine_report(measure_bandwidth: bool = True) -> MachineReport:
    """Gather the report. Measuring takes about a second per thread count."""
    cores = read_cores()
    return MachineReport(
        processor=processor_name(),
        architecture=platform.machine(),
        features=host_features(),
        isa=read_isa(),
        cores=cores,
        memory=read_memory(),
        gpu=read_gpu_path(),
        bandwidth=read_bandwidth(cores.threads) if measure_bandwidth else {},
        versions=read_versions(),
    )


def processor_name() -> str:
    """The processor's name as the kernel reports it."""
    for line in sysfiles.lines("proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Processor", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def host_features() -> tuple[str, ...]:
    """Instruction set extensions that processor and operating system offer (LLVM's names)."""
    from hybrid_moe.cpu_kernels.dsl import tiers

    return tuple(sorted(tiers.host_features()))


def read_isa() -> Isa:
    """Every tier, the chosen one, and why."""
    from hybrid_moe.cpu_kernels.dsl import tiers

    reports = tiers.available_tiers()
    rows = tuple(
        TierStatus(r.tier.name, tuple(r.missing))
        for r in reports
        if r.tier.machine in ("", platform.machine())
    )
    forced = os.environ.get("HYBRID_MOE_ISA")
    try:
        chosen = tiers.choose_tier().name
    except ValueError as error:
        return Isa(rows, None, str(error))
    if forced:
        return Isa(rows, chosen, f"forced by HYBRID_MOE_ISA={forced}")
    better = rows[[row.name for row in rows].index(chosen) + 1 :]
    if not better:
        return Isa(rows, chosen, "the most capable tier")
    lacking = f"the next, {better[0].name}, needs {', '.join(better[0].missing)}"
    return Isa(rows, chosen, f"the most capable tier that runs here; {lacking}")


def read_cores() -> Cores:
    """Processors, their limits, and the worker threads that they get."""
    import psutil

    from hybrid_moe.cpu_kernels.pool import topology
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig

    cpuset = topology.allowed_cpus()
    chosen = PoolConfig.choose()
    return Cores(
        online=_told(psutil.cpu_count) or len(cpuset),
        physical=_told(lambda: psutil.cpu_count(logical=False)),
        cpuset=cpuset,
        quota=topology.cgroup_cpu_limit(),
        available=topology.usable_cores(),
        numa_nodes=topology.numa_nodes(),
        threads=chosen.threads,
        pools=chosen.pools,
        bound=chosen.placement.bound,
    )


def read_memory() -> Memory:
    """RAM, its limit, huge pages."""
    import psutil

    from hybrid_moe.cpu_kernels.pool.cgroups import memory_limit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of figures that are not asked for
        state = _told(psutil.virtual_memory)
    total = _told(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return Memory(
        total=state.total if state else total,
        available=state.available if state else None,
        limit=memory_limit(),
        huge_pages=huge_page_state(),
    )


def read_gpu_path() -> GpuPath:
    """The kernels' own answer. Imports torch where there is a GPU."""
    from hybrid_moe.gpu_kernels.toolchain import availability

    found = availability()
    if not found.usable:
        return GpuPath(False, found.reason, None)
    from hybrid_moe.streams.page_lock import trial

    return GpuPath(True, found.reason, trial())


def huge_page_state() -> str | None:
    """The selected word of "always [madvise] never"."""
    for word in sysfiles.read("sys/kernel/mm/transparent_hugepage/enabled").split():
        if word.startswith("["):
            return word.strip("[]")
    return None


def read_bandwidth(cores: int) -> dict[int, float]:
    """GB/s read from memory by 1, 2, 4, ... and all threads."""
    from hybrid_moe.cpu_kernels.ceilings.bandwidth import measure_read_bandwidth

    counts = [1 << i for i in range(cores.bit_length()) if 1 << i < cores] + [cores]
    return {threads: float(measure_read_bandwidth(threads)) for threads in counts}


def read_versions() -> dict[str, str | None]:
    """Of Python, this package, LLVM and the packages that matter; None for those not installed."""
    import llvmlite.binding

    from hybrid_moe import __version__

    return {
        "hybrid_moe": __version__,
        "python": platform.python_version(),
        "LLVM": ".".join(map(str, llvmlite.binding.llvm_version_info)),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _told(ask: Callable[[], Fact]) -> Fact | None:
    """What the system answers, None where it hides the files that the answer is in."""
    try:
        return ask()
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        logger.debug("the system does not tell: %s", error)
        return None
