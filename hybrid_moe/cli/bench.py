"""`hybrid-moe bench`: what this machine can do at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli.errors import readable
from hybrid_moe.cli.tables import grid
from hybrid_moe.cli.terminal import console

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadCeiling
    from hybrid_moe.cpu_kernels.ceilings.peaks import MacCeiling

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)


def ceilings(
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; default: one per available core.")
    ] = None,
    tiers: Annotated[
        str | None, typer.Option(help="Instruction set tiers, with commas; default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time of each figure.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Write a receipt there.")] = None,
    silent: Annotated[bool, typer.Option("--silent", help="No progress bar.")] = False,
) -> None:
    """Measure read bandwidths and peak multiply-accumulate rates: the ceilings of every figure."""
    from rich.progress import track

    from hybrid_moe.cpu_kernels.ceilings import bandwidth, peaks
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig
    from hybrid_moe.planning.receipt import receipt, write_receipt

    threads = PoolConfig.choose(threads).threads
    chosen, skipped = peaks.usable_tiers(_names(tiers))
    progress_console = console(stderr=True)
    steps: list[Callable[[], ReadCeiling | MacCeiling | None]] = [
        *(
            partial(bandwidth.read_ceiling, *place, seconds)
            for place in bandwidth.read_places(threads).items()
        ),
        *(
            partial(peaks.mac_ceilings, tier, op, threads, seconds)
            for tier in chosen
            for op in peaks.MAC_OPS.values()
        ),
    ]
    if json is not None:
        json.open("a").close()  # cannot be written: an error now, not after minutes
    progress = track(
        steps,
        "measuring",
        console=progress_console,
        transient=True,
        disable=silent or not progress_console.is_terminal,
    )
    rows = [step() for step in progress]
    reads = [row for row in rows if isinstance(row, bandwidth.ReadCeiling)]
    macs = [row for row in rows if isinstance(row, peaks.MacCeiling)]
    show_reads(reads)
    show_peaks(macs, threads)
    for tier_name, missing in skipped.items():
        typer.echo(f"skipped: {tier_name} needs {missing}")
    document = receipt(
        "ceilings",
        threads=threads,
        reads=[asdict(r) for r in reads],
        peaks=[asdict(m) for m in macs],
        skipped=skipped,
    )
    write_receipt(json, document)


def show_reads(rows: Sequence[ReadCeiling]) -> None:
    """Print the read bandwidths."""
    grid(
        "Read bandwidth, GB/s: no layer can decode faster",
        ("who", "threads", "in order", "random 4 MiB blocks"),
        [(r.where, str(r.threads), f"{r.in_order:.1f}", f"{r.at_random:.1f}") for r in rows],
    )


def show_peaks(rows: Sequence[MacCeiling], threads: int) -> None:
    """Print the peak rates, what is left of them for each format, and why."""
    from hybrid_moe.cpu_kernels.ceilings.peaks import USES

    grid(
        "Peak multiply-accumulates, 10^9 a second: no layer can prefill faster",
        ("tier", "op", "1 thread", f"{threads} thread{'s' * (threads > 1)}", "of a format"),
        [
            (
                r.tier,
                r.op,
                f"{r.one_thread:.1f}",
                f"{r.all_threads:.1f}",
                ", ".join(f"{name} {rate:.1f}" for name, rate in r.formats.items()),
            )
            for r in rows
        ],
    )
    measured = {row.op for row in rows}
    for name, uses in USES.items():
        for use in uses:
            if use.op in measured:
                typer.echo(f"{name} by {use.op}: {use.why}")


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


bench.command()(readable(ceilings))
