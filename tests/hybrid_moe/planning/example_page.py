"""docs/plan.md: what `plan` and `serve` say of one model on one machine.

`python -m tests.hybrid_moe.planning.example_page` writes it again; a test holds it against the
commands. The checkpoint is header-only (`fake_checkpoints`).
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from unittest.mock import patch

from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.planning import machine
from tests.hybrid_moe.planning.fake_checkpoints import MODELS, write_headers

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "plan.md"
EXAMPLE = ROOT / "examples" / "tiny_moe"
MODEL = "gpt-oss-120b"
MACHINE = "--gpu 24GB --ram 96GB --context 32768"
SMALLER = "gpt-oss-20b"
WITHOUT_GPU = "--ram 24GB --context 8192"
MEASURED = "--gpu 12GB --ram 64GB --gpu-backend cute --profile persuasion.json"
"""The small model of this repository, whose routing was measured."""

CPU = "--threads 16 --pools 1 --ram-bandwidth 80 --gmacs 1000"
"""The processor; the page says what it is."""

HEAD = f"""\
# What `plan` prints

Written by `python -m tests.hybrid_moe.planning.example_page` from headers with the published names,
shapes and configuration: the checkpoint was not at hand. The processor has 16 cores, two channels
of DDR5-5600 and a peak of 1000 GMAC/s; all commands were also given

    {CPU}

Memory is computed from the headers. Speeds with a GPU have one digit, since none has been measured;
without one they have two: shares of the ceilings are those of a whole model that was run.
[sglang.md](sglang.md#what-a-plan-consists-of) says where each line comes from.
"""

ROUTING = """\
With a routing profile ([placement.md](placement.md)) there is a table of what other amounts of GPU
memory would give. This one is of `examples/tiny_moe/model` and its profile of *Persuasion*. Its
experts are so small that hand-overs are nearly all of a token: whole layers go to the GPU once
they fit.
"""


def run(command: str, *, after: str = "") -> str:
    """A `hybrid-moe` command and its output, or what begins with `after`, as a block of
    Markdown."""
    arguments = shlex.split(f"{command} {CPU}")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "96"})
    if result.exit_code:
        raise RuntimeError(f"{command}: {result.output}") from result.exception
    shown = command.removesuffix(" --dry-run")
    printed = result.stdout[result.stdout.index(after) :]
    lines = [f"$ hybrid-moe {shown}", *(["..."] if after else [])]
    lines += [line.rstrip() for line in printed.splitlines()]
    return "\n".join(["```text", *lines, "```", ""])


def page() -> str:
    """The text of the page, as on a machine with huge pages."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in (MODEL, SMALLER):
            write_headers(Path(folder) / name, MODELS[name])
        for name in ("model", "profiles/persuasion.json"):
            (Path(folder) / Path(name).name).symlink_to(EXAMPLE / name)
        os.chdir(folder)
        try:
            with patch.object(machine, "huge_pages_here", lambda: True):
                plan = run(f"plan {MODEL} {MACHINE}")
                serve = run(f"serve --model {MODEL} {MACHINE} --dry-run")
                alone = run(f"plan {SMALLER} {WITHOUT_GPU}")
                measured = run(f"plan model {MEASURED}", after="GPU memory for experts")
        finally:
            os.chdir(before)
    return (
        f"{HEAD}\n{plan}\nWhat `serve` starts then:\n\n{serve}"
        f"\nA smaller model without a GPU, as `generate` runs it:\n\n{alone}"
        f"\n{ROUTING}\n{measured}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
