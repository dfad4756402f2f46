"""`hybrid-moe doctor`: what the machine offers, for people and for bug reports."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli.tables import facts
from hybrid_moe.text import format_bytes, format_ranges

if TYPE_CHECKING:
    from hybrid_moe.integrations.sglang.report import SglangReport
    from hybrid_moe.planning.doctor import MachineReport


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    bandwidth: Annotated[
        bool, typer.Option(help="Measure the memory's read bandwidth (takes seconds).")
    ] = True,
    sglang: Annotated[
        bool, typer.Option("--sglang", help="Show only whether the SGLang plugin fits SGLang.")
    ] = False,
) -> None:
    """Show processor, chosen instruction set, cores, limits, memory and versions."""
    if sglang:
        doctor_sglang(json)
        return
    from hybrid_moe.planning.doctor import machine_report

    report = machine_report(measure_bandwidth=bandwidth)
    if json:
        typer.echo(json_module.dumps(report.to_dict(), indent=2))
        return
    facts("Processor", processor_facts(report))
    facts("Instruction sets", {tier.name: _tier(tier.missing) for tier in report.isa.tiers})
    facts("Cores", core_facts(report))
    facts("Memory", memory_facts(report))
    facts("GPU kernels", gpu_facts(report))
    facts("Versions", {name: v or "not installed" for name, v in report.versions.items()})


def doctor_sglang(json: bool) -> None:
    """Show what the plugin would do in this environment; exit code 1 if SGLang has changed."""
    from hybrid_moe.integrations.sglang.report import plugin_report

    report = plugin_report()
    if json:
        typer.echo(json_module.dumps(report.to_dict(), indent=2))
    else:
        facts("SGLang", sglang_facts(report))
        broken = {name: problem for name, problem in report.problems.items() if problem}
        facts(f"{len(broken)} of {len(report.problems)} things relied on have changed", broken)
    if report.broken:
        raise typer.Exit(1)


def sglang_facts(report: SglangReport) -> dict[str, str]:
    """Version, and who serves `--kt-*`."""
    from hybrid_moe.integrations.sglang import gpu_backend

    return {
        "version": report.version or "unknown",
        "tested": report.tested,
        **({"warning": report.warning} if report.warning else {}),
        "--kt-*": f"{'hybrid_moe' if report.take_over else 'not hybrid_moe'}: {report.reason}",
        "experts on a GPU": gpu_backend.description(report.gpu_backend),
    }


def processor_facts(report: MachineReport) -> dict[str, str]:
    """Name, architecture, features, and the tier that was chosen."""
    isa = report.isa
    return {
        "name": report.processor,
        "architecture": report.architecture,
        "features": " ".join(report.features),
        "chosen": f"{isa.chosen}: {isa.reason}" if isa.chosen else f"none: {isa.reason}",
    }


def core_facts(report: MachineReport) -> dict[str, str]:
    """Processors and what limits them."""
    cores = report.cores
    return {
        "online": f"{cores.online} logical, {cores.physical or 'unknown number of'} physical",
        "cpuset": f"{len(cores.cpuset)} ({format_ranges(cores.cpuset)})",
        "cgroup quota": "none" if cores.quota is None else f"{cores.quota:g} processors",
        "available": f"{cores.available} threads",
        "default": f"{cores.threads} threads, pools: {cores.pools}, "
        + ("one processor each" if cores.bound else "placed by the system within their node"),
        **{f"NUMA node {node}": format_ranges(cpus) for node, cpus in cores.numa_nodes.items()},
    }


def memory_facts(report: MachineReport) -> dict[str, str]:
    """Sizes, limit, huge pages, and the bandwidths that were measured."""
    memory = report.memory
    return {
        "total": _amount(memory.total),
        "available": _amount(memory.available),
        "cgroup limit": "none" if memory.limit is None else format_bytes(memory.limit),
        "transparent huge pages": memory.huge_pages or "unknown",
        **{
            f"read, {threads} thread{'s' if threads > 1 else ''}": f"{speed:.1f} GB/s"
            for threads, speed in report.bandwidth.items()
        },
    }


def gpu_facts(report: MachineReport) -> dict[str, str]:
    """Whether they are used, and why or why not; and whether panels can be page-locked."""
    gpu = report.gpu
    locking = {} if gpu.page_locking is None else {"page-locked memory": gpu.page_locking}
    return {"used" if gpu.usable else "not used": gpu.reason, **locking}


def _amount(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_bytes(nbytes)


def _tier(missing: tuple[str, ...]) -> str:
    return "usable" if not missing else f"needs {', '.join(missing)}"
