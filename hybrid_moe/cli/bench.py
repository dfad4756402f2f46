"""`hybrid-moe bench`: what this machine can do at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli.errors import readable
from hybrid_moe.cli.tables import grid

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.ceilings import MacCeiling, ReadCeiling

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
    from rich.console import Console
    from rich.progress import track

    from hybrid_moe.cpu_kernels import ceilings as c
    from hybrid_moe.cpu_kernels.pool.topology import usable_cores
    from hybrid_moe.receipt import receipt, write_receipt

    threads = threads or usable_cores()
    if json is not None:
        json.touch()  # a file that cannot be written is told before the time is spent
    chosen, skipped = c.usable_tiers(_names(tiers))
    places = c.read_places(threads)
    peaks = [(tier, op) for tier in chosen for op in c.MAC_OPS.values()]
    console = Console(stderr=True)
    progress = track(
        [*places.items(), *peaks],
        "measuring",
        console=console,
        transient=True,
        disable=silent or not console.is_terminal,
    )
    reads, macs = [], []
    for first, second in progress:
        if isinstance(first, str):
            reads.append(c.read_ceiling(first, second, seconds))
        elif (row := c.mac_ceilings(first, second, threads, seconds)) is not None:
            macs.append(row)
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
    """Print the peak rates and what they mean for each format."""
    grid(
        "Peak multiply-accumulates, 10^9 a second: no layer can prefill faster",
        ("tier", "op", "1 thread", f"{threads} thread{'s' * (threads > 1)}", "of a format"),
        [
            (r.tier, r.op, f"{r.one_thread:.1f}", f"{r.all_threads:.1f}", _meaning(r.op, r.formats))
            for r in rows
        ],
    )


def _meaning(op: str, formats: Mapping[str, float]) -> str:
    from hybrid_moe.cpu_kernels.ceilings import USES

    return "; ".join(
        f"{name} {rate:.1f} ({use.why})"
        for name, rate in formats.items()
        for use in USES[name]
        if use.op == op
    )


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


bench.command()(readable(ceilings))
