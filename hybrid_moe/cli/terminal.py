"""The terminal: its width and colours, and what a command is doing, on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_WIDTH = 80
"""Columns where the terminal does not say, or says none: some pipes and serial lines do."""


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr; plain text, without colours, where that is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if made.width < 1:
        made.width = _WIDTH
    return made


def text_writer(style: str = "green") -> Callable[[str], None]:
    """Writes pieces of text to stdout at once: in colour on a terminal, else as they are."""
    screen = console()
    if not screen.is_terminal:
        return lambda text: typer.echo(text, nl=False)
    from rich.text import Text

    def write(text: str) -> None:
        screen.print(Text(text, style), end="", soft_wrap=True)

    return write


def token_writer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """Transformers' text streamer: what `put` gets of tokens, `write` gets of finished words."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text)
    return streamer


def make_output_safe() -> None:
    """Let no output fail because of the terminal's encoding or width, or of a closed stream.

    What an encoding cannot express is written as an escape (`\\u4f60`).
    """
    if os.environ.get("COLUMNS") == "0":  # Rich would print nothing at all
        del os.environ["COLUMNS"]
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Steps:
    """The steps of a command: a line on stderr for each that has ended, with its seconds.

    On a terminal a spinner shows the present one.
    """

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.started = perf_counter()
        self._name = ""
        self._began = self.started
        self._spinner: Status | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop_spinner()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return perf_counter() - self.started

    def begin(self, name: str, spin: bool = True) -> None:
        """End the present step and begin another. `spin`: nothing else draws on the terminal."""
        self.end()
        self._name, self._began = name, perf_counter()
        if spin and self.console.is_terminal:
            self._spinner = self.console.status(f"{name} ...")
            self._spinner.start()

    def end(self) -> None:
        """End the present step, if there is one."""
        self._stop_spinner()
        if self._name:
            self.say(f"{self._name}: {perf_counter() - self._began:.1f} s", "dim")
            self._name = ""

    def drop(self) -> None:
        """End the present step without a word."""
        self._stop_spinner()
        self._name = ""

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        from rich.text import Text

        self.console.print(Text(text, style), soft_wrap=True)

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
