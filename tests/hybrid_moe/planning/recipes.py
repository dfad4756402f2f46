"""The recipes of docs/sglang: what `plan` and `serve` say of each model on each machine.

`python -m tests.hybrid_moe.planning.recipes` writes them again; a test holds the files against the
commands. The checkpoints are header-only (`fake_checkpoints`).
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

from typer.testing import CliRunner

from hybrid_moe import planning
from hybrid_moe.cli import app
from hybrid_moe.planning import machine
from tests.hybrid_moe.planning.fake_checkpoints import MODELS, write_headers

DOCS = Path(__file__).parents[3] / "docs"
GUIDE = DOCS / "sglang.md"
COLUMNS = "96"
CPU = "--threads 16 --pools 1 --ram-bandwidth 80 --gmacs 1000"
"""The processor of every recipe; docs/sglang.md says what it is."""

MACHINES = {
    "1 x 24 GB": "--gpu 24GB",
    "1 x 32 GB": "--gpu 32GB",
    "2 x 24 GB": "--gpu 2x24GB",
    "CPU only": "",
}


@dataclass(frozen=True)
class Recipe:
    """One model: directory of the experts, of the original if it was converted, and memory."""

    model: str
    ram: str
    original: str = ""
    context: str = "32768"

    @property
    def page(self) -> Path:
        """Its file."""
        return DOCS / "sglang" / f"{(self.original or self.model).lower()}.md"

    def options(self, machine_options: str) -> str:
        """What both commands are given."""
        base = f"--base {self.original}" if self.original and machine_options else ""
        words = (machine_options, f"--ram {self.ram}", f"--context {self.context}", base)
        return " ".join(filter(None, words))


RECIPES = (
    Recipe("DeepSeek-V4-Flash", "192GB"),
    Recipe("gpt-oss-120b", "96GB"),
    Recipe("gpt-oss-20b", "32GB"),
    Recipe("Qwen3-30B-A3B-MXFP4", "64GB", "Qwen3-30B-A3B"),
    Recipe("Qwen3-235B-A22B-MXFP4", "192GB", "Qwen3-235B-A22B", "16384"),
)


@contextmanager
def checkpoints() -> Iterator[None]:
    """Work in a folder of header-only checkpoints, each read once, on a machine with huge pages."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in MODELS.items():
            write_headers(Path(folder) / name, model)
        os.chdir(folder)
        try:
            with (
                patch.object(planning, "read_model", cache(planning.read_model)),
                patch.object(machine, "huge_pages_here", lambda: True),
            ):
                yield
        finally:
            os.chdir(before)


@cache
def run(command: str) -> str:
    """The output of a `hybrid-moe` command, its errors last."""
    arguments = shlex.split(f"{command} {CPU}")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": COLUMNS})
    if result.exit_code not in (0, 2):
        raise RuntimeError(f"{command}: {result.output}") from result.exception
    text = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    return f"{text}\n{result.stderr.strip()}" if result.exit_code else text


def page(recipe: Recipe) -> str:
    """The text of a recipe's file."""
    name = recipe.original or recipe.model
    lines = [
        f"# {name}",
        "",
        "Written by `python -m tests.hybrid_moe.planning.recipes`. What the figures mean is in",
        "[sglang.md](../sglang.md); no GPU has run these yet. Both commands were also given the",
        f"processor that is planned for: `{CPU}`.",
    ]
    if recipe.original:
        convert = f"hybrid-moe convert --model {recipe.original} --out {recipe.model}"
        lines += ["", "First, once:", "", f"    {convert}"]
    for title, options in MACHINES.items():
        given = recipe.options(options)
        plan = f"plan {recipe.model} {given}"
        lines += ["", f"## {title}", "", *_block(f"hybrid-moe {plan}", run(plan))]
        if not options:
            lines += ["", "To run it, through Transformers:", ""]
            lines.append(f'    hybrid-moe generate --model {recipe.model} --prompt "..."')
            continue
        serve = f"serve --model {recipe.model} {given}"
        lines += ["", "To run it:", "", *_block(f"hybrid-moe {serve}", run(f"{serve} --dry-run"))]
    return "\n".join(lines) + "\n"


def _block(command: str, output: str) -> list[str]:
    return ["```text", f"$ {command}", *output.splitlines(), "```"]


def summary() -> str:
    """The table of all recipes, from their pages."""
    rows = [
        "| model | machine | experts on the GPU, per layer | each GPU | RAM | decode | prefill |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for recipe in RECIPES:
        name = recipe.original or recipe.model
        for title, options in MACHINES.items():
            text = run(f"plan {recipe.model} {recipe.options(options)}")
            hot = re.search(r"(\d+) per layer", text)
            rows.append(
                f"| [{name}](sglang/{recipe.page.name}) | {title} | {hot[1] if hot else 0} "
                f"| {_size(text, 'each GPU')} | {_size(text, 'RAM')} "
                f"| {_speed(text, 'Decode')} | {_speed(text, 'Prefill')} |"
            )
    return "\n".join(rows) + "\n"


def _size(text: str, place: str) -> str:
    found = re.search(rf"│ all, of [^│]*│ +{place} │ +(\S+ GiB)", text)
    return found[1] if found else "-"


def _speed(text: str, title: str) -> str:
    found = re.search(rf"{title}: (\S+) tok/s", text)
    assert found is not None, text
    return f"{found[1]} tok/s"


def with_summary(guide: str) -> str:
    """The guide with its table replaced."""
    begin, end = "<!-- recipes:begin -->\n", "<!-- recipes:end -->"
    head, _, rest = guide.partition(begin)
    _, _, tail = rest.partition(end)
    if not tail:
        raise ValueError(f"{GUIDE} has no place for the table: {begin!r} to {end!r}")
    return f"{head}{begin}{summary()}{end}{tail}"


def files() -> dict[Path, str]:
    """Every generated file and what it should hold. Run inside `checkpoints()`."""
    pages = {recipe.page: page(recipe) for recipe in RECIPES}
    return {**pages, GUIDE: with_summary(GUIDE.read_text("utf-8"))}


def main() -> None:
    """Write the files."""
    with checkpoints():
        written = files()
    for file, text in written.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
