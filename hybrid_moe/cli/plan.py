"""`hybrid-moe plan`: what a model needs on a machine and how fast it will be, before loading."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli import machine_options as o
from hybrid_moe.cli.models import ModelArgument
from hybrid_moe.cli.tables import facts, grid
from hybrid_moe.text import format_bytes

if TYPE_CHECKING:
    from hybrid_moe.planning import Plan, Prediction


_TERMS = ("what", "time", "amount and speed")


def plan(
    model: ModelArgument,
    gpu: o.GpuOption = None,
    ram: o.RamOption = None,
    context: o.ContextOption = None,
    base: o.BaseOption = None,
    method: o.MethodOption = None,
    dense: o.DenseOption = "bf16",
    gpu_experts: o.GpuExpertsOption = None,
    gpu_backend: o.GpuBackendOption = None,
    stream_prefill: o.StreamPrefillOption = None,
    profile: o.ProfileOption = None,
    requests: o.RequestsOption = None,
    request_speed: o.RequestSpeedOption = None,
    chunk: o.ChunkOption = o.DEFAULT_CHUNK,
    threads: o.ThreadsOption = None,
    pools: o.PoolsOption = None,
    ceilings: o.CeilingsOption = None,
    ram_bandwidth: o.RamBandwidthOption = None,
    gmacs: o.GmacsOption = None,
    gpu_bandwidth: o.GpuBandwidthOption = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan there.")] = None,
) -> None:
    """Show what goes where, whether it fits, how fast it will be, and what limits it.

    Reads headers and configuration only. Exits with 2 where the model does not fit.
    """
    options = o.MachineOptions(
        gpu, ram, context, base, method, gpu_experts, profile, requests, chunk, threads, pools,
        ceilings, ram_bandwidth, gmacs, gpu_bandwidth, dense, gpu_backend,
        stream_prefill, request_speed,
    )  # fmt: skip
    made = options.plan(model)
    if json is not None:
        json.write_text(json_module.dumps(made.to_dict(), indent=1) + "\n")
    show(made)
    made.check()


def show(plan: Plan) -> None:
    """Print a plan."""
    from hybrid_moe.planning.admission import admission_note
    from hybrid_moe.planning.plan import GPU, RAM

    model, request = plan.model, plan.request
    least = min(layer.top_k for layer in model.layers)
    per_token = f"{model.top_k}" if least == model.top_k else f"{least} to {model.top_k}"
    experts = f"{model.num_experts} in each of {len(model.layers)} layers, {per_token} per token"
    sizes = {layer.formats.name: format_bytes(layer.packed) for layer in model.layers}
    speeds = {layer.formats.name: layer.rate(request.cpu.macs) for layer in model.layers}
    rates = ", ".join(f"{rate / 1e9:.0f}" for rate in speeds.values())
    facts(
        str(model.path),
        {
            "family": model.family,
            "experts": f"{experts}, "
            + " or ".join(f"{size} each as {name}" for name, size in sizes.items()),
            "context": f"{request.context} tokens",
            "CPU": f"{request.cpu.read / 1e9:.1f} GB/s, "
            f"{rates} GMAC/s ({request.cpu.source}); "
            f"{request.threads} threads, pools: {request.pools}",
            **{f"GPU {i}": _gpu(g.nbytes, g.bandwidth, g.source)
               for i, g in enumerate(request.gpus)},
        },
    )  # fmt: skip
    rows = [
        (part.name, part.place, format_bytes(part.nbytes), "assumed: " * part.assumed + part.note)
        for part in plan.parts
    ]
    for place, size in ((GPU, request.room if request.gpus else 0), (RAM, request.ram)):
        if plan.nbytes(place):
            rows.append(
                (f"all, of {format_bytes(size)}", place, format_bytes(plan.nbytes(place)), "")
            )
    grid("Memory", ("part", "place", "size", "how"), rows)
    for title, prediction in (("Decode", plan.decode), ("Prefill", plan.prefill)):
        _show_prediction(title, prediction, measured=not request.gpus)
    if plan.curve:
        _show_curve(plan)
    for note in (*plan.notes, *([admission_note(plan)] if request.gpus else [])):
        typer.echo(f"note: {note}")


def _gpu(nbytes: int, bandwidth: float, source: str) -> str:
    return f"{format_bytes(nbytes)}, {bandwidth / 1e9:.0f} GB/s ({source})"


def speed(prediction: Prediction, *, measured: bool) -> str:
    """Tokens per second in as many digits as a prediction knows: two where its shares of the
    ceilings were measured, one where they are assumed.

    Args:
        measured: they were; on a GPU they never were.
    """
    if measured:
        return f"about {digits(prediction.tokens_per_second, 2)} tok/s"
    return f"about {digits(prediction.tokens_per_second, 1)} tok/s, not measured"


def digits(value: float, count: int) -> str:
    """4321.0 in one digit is "4000", 0.0321 in two "0.032"."""
    return f"{float(f'{value:.{count}g}'):g}"


def _show_prediction(title: str, prediction: Prediction, *, measured: bool) -> None:
    count = 2 if measured else 1
    rows = [(term.name, _time(term.seconds, count), term.why) for term in prediction.terms]
    grid(f"{title}: {speed(prediction, measured=measured)}", _TERMS, rows)
    typer.echo(f"limit: {prediction.limit}\nwould help: {prediction.help}")


_CURVE = ("experts", "of all", "hits", "decode", "", "first ids: hits", "decode")


def _show_curve(plan: Plan) -> None:
    """Hit rate and speed by GPU memory; the plan's own row is marked."""
    most = max(point.tokens_per_second for point in plan.curve)
    rows = [
        (
            f"{format_bytes(point.nbytes)}{' <' if point.chosen else ''}",
            f"{100 * point.share:.0f} %",
            f"{100 * point.hit_rate:.1f} %",
            f"{digits(point.tokens_per_second, 2)} tok/s",
            "█" * round(8 * point.tokens_per_second / most),
            f"{100 * point.first_ids_hit_rate:.1f} %",
            f"{digits(point.first_ids_tokens_per_second, 2)} tok/s",
        )
        for point in plan.curve
    ]
    grid("GPU memory for experts, by measured routing; < is this plan", _CURVE, rows)
    typer.echo("hits: pairs of token and expert on the GPU; speeds are computed, not measured")


def _time(seconds: float, count: int) -> str:
    if seconds >= 1:
        return f"{digits(seconds, count)} s"
    return f"{digits(1e3 * seconds, count)} ms"
