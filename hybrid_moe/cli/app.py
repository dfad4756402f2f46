"""The command's root: its subcommands and the options before them."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrid_moe.cli.bench import bench
from hybrid_moe.cli.chat import chat
from hybrid_moe.cli.convert import convert
from hybrid_moe.cli.doctor import doctor
from hybrid_moe.cli.errors import readable, settings
from hybrid_moe.cli.generate import generate
from hybrid_moe.cli.inspect import inspect
from hybrid_moe.cli.plan import plan
from hybrid_moe.cli.profile import profile
from hybrid_moe.cli.serve import CONTEXT_SETTINGS, serve
from hybrid_moe.cli.terminal import make_output_safe

app = typer.Typer(
    name="hybrid-moe",
    help="Mixture-of-experts models far larger than the GPU: experts at the speed of the memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, chat, convert, inspect, plan, doctor):
    app.command()(readable(command))
app.command(context_settings=CONTEXT_SETTINGS)(readable(serve))
app.add_typer(bench, name="bench")
app.add_typer(profile, name="profile")


def _show_version(wanted: bool) -> None:
    if wanted:
        from hybrid_moe import __version__

        typer.echo(f"hybrid-moe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="HYBRID_MOE_DEBUG", help="Show tracebacks of errors."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of every subcommand."""
    settings.debug = debug


def main() -> None:
    """Entry point of the `hybrid-moe` script."""
    make_output_safe()
    app()
