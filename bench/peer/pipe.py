"""The worker's end of a pipe: commands are JSON lines on standard input, answers JSON lines on
standard output; whatever a library prints goes to standard error."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

from peer.interface import UnavailableError

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends: it may be stopped by then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def answer_commands(worker: object) -> None:
    """Call the method of `worker` that each command names, until the pipe is closed."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("op"))(**command)
        except (UnavailableError, ImportError) as reason:
            answer = {"unavailable": str(reason)}
        print(json.dumps(answer), file=answers, flush=True)
