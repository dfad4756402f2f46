"""Errors of the user's making as one paragraph instead of a traceback.

Exit codes: 0 done, 2 an error that the message explains, 130 interrupted; anything else is a bug
and shows its traceback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import typer

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

EXTRAS = {"transformers": "transformers", "tokenizers": "transformers", "gguf": "gguf"}
"""Module -> the extra of this package that installs it."""

USER_ERRORS = (OSError, ValueError, NotImplementedError, ImportError, MemoryError)
"""Missing files, damaged checkpoints, impossible settings, unsupported models, missing extras,
models larger than the memory."""


@dataclass
class Settings:
    """Options that the root command was given."""

    debug: bool = False


settings = Settings()


def readable(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a subcommand so that `USER_ERRORS` print one paragraph on stderr and exit with 2.

    `--debug` or HYBRID_MOE_DEBUG=1 leaves them as they are.
    """

    @functools.wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # `... | head`: the reader has enough, which is no error
            raise
        except USER_ERRORS as error:
            if settings.debug:
                raise
            typer.echo(f"hybrid-moe: {explain(error)}", err=True)
            raise typer.Exit(2) from error

    return wrapped


def explain(error: BaseException) -> str:
    """The message of `error` in one paragraph, with what to install for a missing extra."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = EXTRAS.get(error.name.partition(".")[0])
        if extra is not None:
            return f'{error.name} is not installed: pip install "hybrid-moe[{extra}]"'
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
