"""`hybrid-moe convert`: a checkpoint with its experts in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid_moe.cli.models import ModelOption


def convert(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    method: Annotated[
        str, typer.Option(help="Weight format of the experts: docs/formats.md lists them.")
    ] = "MXFP4",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, of RAWINT4: 32, 64 or 128.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that quantise; default: every core.")
    ] = None,
    gate_up_layout: Annotated[
        str | None,
        typer.Option(help="halves or interleaved: of fused experts where no one knows the model."),
    ] = None,
) -> None:
    """Quantise a checkpoint's experts; everything else is copied."""
    from hybrid_moe.cpu_kernels.pool.topology import usable_cores
    from hybrid_moe.loaders import convert_checkpoint
    from hybrid_moe.loaders.find_model import find_model

    threads = threads or usable_cores()
    convert_checkpoint(
        find_model(model),
        out,
        method,
        threads=threads,
        gate_up_layout=gate_up_layout,
        group_size=group_size,
    )
    typer.echo(f"wrote {out}", err=True)
