"""A library in a process of its own, which runs only while it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from typing import Any

from problem import Calls

from peer.find import Place
from peer.interface import UnavailableError


class WorkerProcess:
    """Starts a worker; stopped (SIGSTOP) between questions, since idle threads may spin."""

    def __init__(self, name: str, place: Place, threads: int, module: str = "peer.worker") -> None:
        self.name = name
        self.label = name
        # a file, since a pipe that nobody reads fills up
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [place.python, "-m", module, name],
            cwd=place.bench,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS=str(threads)) | place.variables,
        )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Wake the worker, wait for its answer, stop it.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {status}: {self._errors.read()[-500:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def load(self, **problem: Any) -> None:
        """Load a layer or a model.

        Raises:
            RuntimeError: the process ended.
            UnavailableError: the library cannot run it.
        """
        answer = self.ask("setup", **problem)
        if "unavailable" in answer:
            raise UnavailableError(answer["unavailable"])
        self.label = answer["label"]

    def run(self, seconds: float) -> Calls:
        """Calls for so many seconds, one at least."""
        answer = self.ask("run", seconds=seconds, least=1)
        return Calls(answer["samples"], answer["others"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
