"""`hybrid-moe serve`: an SGLang server with the flags that the plan chose."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli import machine_options as o
from hybrid_moe.cli.models import ModelOption

if TYPE_CHECKING:
    from hybrid_moe.planning.serving import ServerCommand

CONTEXT_SETTINGS = {"allow_extra_args": True}
"""What follows `--` is SGLang's."""


def serve(
    rest: typer.Context,
    model: ModelOption,
    gpu: o.GpuOption = None,
    ram: o.RamOption = None,
    context: o.ContextOption = None,
    base: o.BaseOption = None,
    method: o.MethodOption = None,
    gpu_experts: o.GpuExpertsOption = None,
    profile: o.ProfileOption = None,
    requests: o.RequestsOption = 4,
    chunk: o.ChunkOption = 2048,
    threads: o.ThreadsOption = None,
    pools: o.PoolsOption = None,
    ceilings: o.CeilingsOption = None,
    ram_bandwidth: o.RamBandwidthOption = None,
    gmacs: o.GmacsOption = None,
    gpu_bandwidth: o.GpuBandwidthOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and do not run it.")
    ] = False,
) -> None:
    """Print and run the SGLang server that `plan` chose. Flags after -- go to SGLang."""
    from hybrid_moe.planning.serving import require_sglang, server_command

    options = o.MachineOptions(
        gpu, ram, context, base, method, gpu_experts, profile, requests, chunk, threads, pools,
        ceilings, ram_bandwidth, gmacs, gpu_bandwidth,
    )  # fmt: skip
    if not dry_run:
        require_sglang()  # before headers are read and ceilings measured
    python = "python" if dry_run else sys.executable
    plan = options.plan(model)
    command = server_command(plan, python, rest.args)
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(command.text)
    if not dry_run:
        _become(command)


def _become(command: ServerCommand) -> None:
    """Replace this process: signals and the exit code are the server's own."""
    sys.stdout.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})
