"""`hybrid-moe serve`: Transformers' server here, or with a GPU an SGLang server as planned."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli import machine_options as o
from hybrid_moe.cli.local_server import listen, require_server, serve_here
from hybrid_moe.cli.model_options import (
    DENSE,
    CacheOption,
    CpuActivationOption,
    DraftOption,
    DynamicOption,
    LoadOptions,
)
from hybrid_moe.cli.models import ModelOption
from hybrid_moe.cli.terminal import Steps

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
    dense: o.DenseOption = DENSE,
    gpu_experts: o.GpuExpertsOption = None,
    gpu_backend: o.GpuBackendOption = None,
    stream_prefill: o.StreamPrefillOption = None,
    cpu_activation: CpuActivationOption = None,
    profile: o.ProfileOption = None,
    dynamic: DynamicOption = None,
    quality: Annotated[
        str,
        typer.Option(
            metavar="exact|balanced",
            help="Decode with --gpu: balanced adds a quarter of a token's experts one layer later, "
            "while the GPU is at attention.",
        ),
    ] = "exact",
    requests: o.RequestsOption = None,
    request_speed: o.RequestSpeedOption = None,
    chunk: o.ChunkOption = o.DEFAULT_CHUNK,
    threads: o.ThreadsOption = None,
    pools: o.PoolsOption = None,
    cache: CacheOption = None,
    draft: DraftOption = None,
    ceilings: o.CeilingsOption = None,
    ram_bandwidth: o.RamBandwidthOption = None,
    gmacs: o.GmacsOption = None,
    gpu_bandwidth: o.GpuBandwidthOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at, without a GPU.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port, without a GPU; 0 takes a free one.")
    ] = 8000,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that answers have when told to stop, without GPU.")
    ] = 5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and do not run it.")
    ] = False,
) -> None:
    """Serve a model by OpenAI's API.

    Without --gpu Transformers' server runs in this process. With one the SGLang server that `plan`
    chose is printed and run, and flags after -- go to SGLang.
    """
    from hybrid_moe.planning.admission import admission_note
    from hybrid_moe.planning.draft_steps import draft_notes
    from hybrid_moe.planning.serving import require_sglang, server_command, write_placement
    from hybrid_moe.schedule.quality import EXACT, quality_named

    quality_named(quality, "--quality ")
    options = o.MachineOptions(
        gpu, ram, context, base, method, gpu_experts, profile, requests, chunk, threads, pools,
        ceilings, ram_bandwidth, gmacs, gpu_bandwidth, dense, gpu_backend,
        stream_prefill, request_speed,
    )  # fmt: skip
    if not gpu:
        if rest.args:
            raise ValueError(f"{rest.args[0]}: what follows -- is for SGLang, which needs a --gpu")
        if quality != EXACT:
            raise ValueError("--quality is for decode beside a GPU: add --gpu")
        if base is not None:
            raise ValueError("--base is for SGLang, which needs a --gpu")
        if dry_run:
            _check_fit(options, model)
            typer.echo(f"Transformers' server in this process, at http://{host}:{port}/v1")
            return
        with Steps() as steps:
            listener = listen(host, port)
            steps.begin("importing the server")
            require_server()
            steps.begin("seeing whether the model fits")
            _check_fit(options, model)
            load = LoadOptions(
                method, dense, threads, pools, gpu_experts, gpu_backend, cpu_activation, cache,
                dynamic,
            )  # fmt: skip
            serve_here(model, load, draft, context, grace, listener, steps)
        return
    if cache is not None:
        raise ValueError("--cache is for models that are served here, without a --gpu")
    if draft is not None:
        raise ValueError(
            "--draft is for models that are served here, without a --gpu; SGLang has flags of its "
            "own, which go after --: --speculative-algorithm, --speculative-draft-model-path"
        )
    moving = _moving(dynamic, gpu_backend)
    if not dry_run:
        require_sglang()  # before headers are read and ceilings measured
    python = "python" if dry_run else sys.executable
    plan = options.plan(model)
    command = server_command(plan, python, rest.args, quality, cpu_activation)
    command = replace(command, environment={**command.environment, **moving})
    for note in (*plan.notes, admission_note(plan), *draft_notes(plan, rest.args)):
        typer.echo(f"note: {note}", err=True)
    written = write_placement(plan)
    if written is not None:
        typer.echo(f"note: placement written to {written}", err=True)
    typer.echo(command.text)
    if not dry_run:
        _become(command)


def _check_fit(options: o.MachineOptions, model: str) -> None:
    """Raise `DoesNotFitError` before minutes of loading. How fast it will be is not asked: any
    speeds do, and nothing is measured."""
    replace(options, ram_bandwidth=1.0, gmacs=1.0, ceilings=None).plan(model).check()


def _moving(dynamic: str | None, gpu_backend: str | None) -> dict[str, str]:
    """Variables that let experts move in SGLang.

    Raises:
        ValueError: they cannot.
    """
    from hybrid_moe.integrations.sglang.gpu_backend import DYNAMIC
    from hybrid_moe.placement.online import OnlineOptions

    if dynamic is None or OnlineOptions.of(dynamic) is None:
        return {}
    if gpu_backend is None:
        raise ValueError(
            f"--dynamic {dynamic}: experts on the GPU that are SGLang's cannot move: give "
            "--gpu-backend cute"
        )
    return {DYNAMIC: dynamic}


def _become(command: ServerCommand) -> None:
    """Replace this process: signals and the exit code are the server's own."""
    sys.stdout.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})
