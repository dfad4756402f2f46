"""Errors as one paragraph instead of a traceback.

Exit codes: 0 done, 1 an error that nobody foresaw, 2 an error that the message explains, 130
interrupted. `--debug` or HYBRID_MOE_DEBUG=1 leaves exceptions as they are.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import typer

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

EXTRAS = {
    "transformers": "transformers",
    "tokenizers": "transformers",
    "accelerate": "transformers",
    "huggingface_hub": "transformers",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
    "matplotlib": "plot",
}
"""Module -> the extra of this package that installs it."""

USER_ERRORS = (OSError, ValueError, NotImplementedError, ImportError, MemoryError)
"""Missing files, damaged checkpoints, impossible settings, unsupported models, missing extras,
models larger than the memory."""

_FOR_TYPER = (typer.Exit, typer.Abort, typer.BadParameter)


@dataclass
class Settings:
    """Options that the root command was given."""

    debug: bool = False


settings = Settings()


def readable(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a subcommand so that an error is one paragraph on stderr, and output is complete."""

    @functools.wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()  # a full disk must not go unnoticed
            return result
        except (BrokenPipeError, *_FOR_TYPER):  # `... | head`: the reader has enough, no error
            raise
        except Exception as error:
            if settings.debug:
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
                _drop_output()
            typer.echo(f"hybrid-moe: {explain(error)}", err=True)
            raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from error

    return wrapped


def explain(error: BaseException) -> str:
    """The message of `error` in one paragraph, with what to install for a missing extra."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = EXTRAS.get(error.name.partition(".")[0])
        if extra is not None:
            return f'{error.name} is not installed: pip install "hybrid-moe[{extra}]"'
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    message = " ".join(str(error).split())
    if isinstance(error, USER_ERRORS):
        return message or type(error).__name__
    return (
        f"{type(error).__name__}{': ' * bool(message)}{message} (nobody foresaw this: "
        "HYBRID_MOE_DEBUG=1 shows where it happened)"
    )


def _drop_output() -> None:
    """What is still buffered cannot be written: the interpreter's end must not try again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file is behind it: then nothing is tried
        return
