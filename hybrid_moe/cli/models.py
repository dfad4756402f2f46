"""The MODEL that subcommands take, and what is checked of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hybrid_moe.cli.errors import USER_ERRORS

WHAT = "a checkpoint's folder, a GGUF file, or the id (org/name) of one in the Hugging Face cache"

ModelOption = Annotated[str, typer.Option(help=f"The model: {WHAT}.", metavar="MODEL")]
ModelArgument = Annotated[
    str, typer.Argument(help=f"{WHAT[0].upper()}{WHAT[1:]}.", metavar="MODEL")
]


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
