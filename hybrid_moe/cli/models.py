"""The MODEL that subcommands take, and what is checked of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hybrid_moe.cli.errors import USER_ERRORS

WHAT = "a checkpoint's folder, or the id (org/name) of one in the Hugging Face cache"

ModelOption = Annotated[str, typer.Option(help=f"The model: {WHAT}.", metavar="MODEL")]
ModelArgument = Annotated[str, typer.Argument(help=f"{WHAT}.".capitalize(), metavar="MODEL")]


def routing_problem(
    path: Path, num_experts: int | None, top_k: int | tuple[int, ...] | None
) -> str | None:
    """What is wrong with the number of experts that a token takes (in any layer, of layers that
    differ), None if nothing is."""
    if not num_experts:
        return None
    taken = (top_k,) if isinstance(top_k, int) else top_k or ()
    wrong = next((k for k in taken if not 1 <= k <= num_experts), None)
    if wrong is None:
        return None
    return (
        f"config.json of {path} lets a token take {wrong} experts of {num_experts}: "
        f"num_experts_per_tok must be between 1 and {num_experts}"
    )


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Errors that another package raises at a user's file say which file it was.

    Those that say so themselves pass, and so do those of the system (no thread, no memory).
    """
    try:
        yield
    except Exception as error:
        known = (*USER_ERRORS, RuntimeError)
        if isinstance(error, known) and not isinstance(error, RecursionError):
            raise
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
