"""Steps: commands with a limit, each in a process group of its own. None stops another one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LAST_S = 5.0
"""Of the whole time, kept for the report."""
LEAST_S = 5.0
"""A step with less time than this is not begun."""
TAIL_LINES = 40


@dataclass(frozen=True)
class Step:
    """One thing that is checked or measured.

    Attributes:
        name: in the table.
        command: its words.
        limit_s: most seconds.
        missing: why it cannot run here; empty if it can.
        env: variables in addition.
        points: the command writes JSON lines of measurements there.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    missing: str = ""
    env: dict[str, str] = field(default_factory=dict)
    points: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "passed", "failed", "too slow" or "not run", in how many seconds, why,
    and the end of what it said."""

    name: str
    state: str
    seconds: float
    reason: str
    tail: str


def run_all(steps: Sequence[Step], seconds: float, log: Path) -> Iterator[Outcome]:
    """Run steps within `seconds` in all; everything that they say goes to the file `log`."""
    end = time.monotonic() + seconds - LAST_S
    with log.open("w") as output:
        for step in steps:
            left = end - time.monotonic()
            if step.missing:
                yield Outcome(step.name, "not run", 0.0, step.missing, "")
            elif left < LEAST_S:
                yield Outcome(step.name, "not run", 0.0, "no time was left", "")
            else:
                yield _run(step, min(step.limit_s, left), output.fileno(), log)


def _run(step: Step, limit_s: float, output: int, log: Path) -> Outcome:
    os.write(output, f"\n==== {step.name}: {' '.join(step.command)}\n".encode())
    begin, first = time.monotonic(), log.stat().st_size
    process = subprocess.Popen(
        step.command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **step.env},
        start_new_session=True,
    )
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    except BaseException:  # Ctrl-C: nothing may stay on the GPU
        _end(process)
        raise
    _end(process)
    seconds = time.monotonic() - begin
    with log.open("rb") as text:
        text.seek(first)
        lines = text.read().decode(errors="replace").strip().splitlines()
    tail = "\n".join(lines[-TAIL_LINES:])
    last = lines[-1].strip("= ") if lines else "it said nothing"
    if code is None:
        return Outcome(step.name, "too slow", seconds, f"stopped after {limit_s:.0f} s", tail)
    if code:
        return Outcome(step.name, "failed", seconds, f"{_ending(code)}: {last}"[:300], tail)
    return Outcome(step.name, "passed", seconds, last[:300], tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of the step's process and of all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _ending(code: int) -> str:
    return f"status {code}" if code > 0 else f"signal {-code}"
