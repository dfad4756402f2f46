"""`hybrid-moe inspect`: what is in a checkpoint and how much memory it needs."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_moe.cli.models import ModelArgument
from hybrid_moe.cli.tables import facts, grid
from hybrid_moe.text import format_bytes, format_ranges

if TYPE_CHECKING:
    from hybrid_moe.loaders import CheckpointSummary


def inspect(
    model: ModelArgument,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show family, layers, experts, formats, bytes of each part and the memory needed.

    Exits with 1 where the checkpoint cannot be loaded as it is.
    """
    from hybrid_moe.loaders import inspect_checkpoint
    from hybrid_moe.loaders.find_model import find_model

    summary = inspect_checkpoint(find_model(model))
    if json:
        typer.echo(json_module.dumps(asdict(summary), indent=2))
    else:
        facts(summary.path, model_facts(summary))
        total = max(1, summary.total_bytes)
        rows = [
            (part, format_bytes(nbytes), f"{nbytes / total:.1%}")
            for part, nbytes in summary.parts.items()
        ]
        grid(
            "Bytes",
            ("part", "size", "share"),
            [*rows, ("all", format_bytes(summary.total_bytes), "")],
        )
        needs = [
            (method, format_bytes(nbytes), format_bytes(nbytes + summary.ram_rest))
            for method, nbytes in summary.ram_experts.items()
        ]
        if needs:
            grid("Memory, all experts on the CPU", ("method", "experts", "with the rest"), needs)
    for problem in summary.problems:
        typer.echo(f"problem: {problem}", err=True)
    if summary.problems:
        raise typer.Exit(1)


def model_facts(summary: CheckpointSummary) -> dict[str, str]:
    """Family, sizes and formats."""
    layers = "unknown" if summary.num_layers is None else str(summary.num_layers)
    rows = {
        "family": summary.model_type or "unknown (no config.json)",
        "architectures": ", ".join(summary.architectures) or "unknown",
        "layers": f"{layers}, with experts: {_layers(summary.moe_layers)}",
        "draft layers": f"{_layers(summary.draft_layers)}, not counted",
        "experts": f"{summary.num_experts} per layer, {_per_token(summary)} per token",
        "sizes": f"hidden {summary.hidden}, intermediate {summary.intermediate}",
        "names": summary.scheme or "no experts under a known name",
        "formats": "; ".join(f"{n}: layers {_layers(ls)}" for n, ls in summary.formats.items()),
        "dtypes": ", ".join(f"{dtype} {format_bytes(n)}" for dtype, n in summary.dtypes.items()),
        "files": f"{summary.num_shards} with {summary.num_tensors} tensors",
    }
    if summary.scheme is None:
        del rows["experts"], rows["sizes"], rows["formats"]
    if not summary.draft_layers:
        del rows["draft layers"]
    return rows


def _per_token(summary: CheckpointSummary) -> str:
    count = summary.experts_per_token
    if isinstance(count, tuple):
        return f"{min(count)} to {max(count)}"
    return str(count or "an unknown number")


def _layers(numbers: Sequence[int]) -> str:
    return f"{format_ranges(numbers)} ({len(numbers)})" if numbers else "none"
