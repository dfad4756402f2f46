"""Compilers in processes of their own, since the tool chain may crash and is not thread-safe.

A compiler is started with one end of a socket pair, answers one request after another and ends when
the other end is closed. Requests and answers are pickled, which is safe here: both ends are ours.
Whatever compilers print goes to a file of which an error shows the end.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from hybrid_moe.gpu_kernels.definition import Artifacts, KernelDefinition, compile_here

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""The largest kernel takes about 3 s, on a core that others use 10 times that."""
_SHOWN = 4000
"""Characters of a compiler's output in an error."""

_MAIN = """
import sys
sys.path[:] = {path!r}
from {module} import serve
serve({descriptor})
"""


class CompileError(RuntimeError):
    """A kernel could not be compiled; the message names it, its configuration and architecture."""


class Compiler:
    """A process that compiles. Used by one thread at a time; `with` ends it."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
        self._output.close()

    def compile(self, definition: KernelDefinition, arch: str) -> Artifacts:
        """Compile in the process, which is started at the first call and after a crash.

        Raises:
            CompileError: the tool chain refused the kernel, crashed or did not end.
        """
        what = f"{definition.name} ({definition.config!r}) for {arch} was not compiled"
        if self._process is None or self._connection is None:
            self._process, self._connection = self._start()
        try:
            self._connection.send((definition, arch))
            if not self._connection.poll(self._patience_s):
                self._end(kill=True)
                raise CompileError(
                    f"{what}: the compiler did not end in {self._patience_s:g} s{self._said()}"
                )
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._end()
            raise CompileError(f"{what}: the compiler {_ending(code)}{self._said()}") from None
        except (AttributeError, TypeError, ImportError, ValueError) as error:  # of pickle
            raise CompileError(
                f"{what}: another process must be able to import its config and build: {error}"
            ) from error
        if isinstance(answer, Artifacts):
            return answer
        raise CompileError(f"{what}: {answer}")

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
        if not sys.executable:
            raise CompileError("kernels are compiled by a Python process; sys.executable is empty")
        self._output.seek(0)
        self._output.truncate()  # what an earlier process said
        ours, theirs = Pipe()
        with theirs:
            script = _MAIN.format(path=sys.path, module=__name__, descriptor=theirs.fileno())
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the parent's
            )
        return process, ours

    def _end(self, kill: bool = False) -> int:
        """End the process; returns its exit status."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return 0
        if kill:
            process.kill()
        try:
            return process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _said(self) -> str:
        """The end of the compiler's output, as the end of a message."""
        self._output.seek(0)
        text = self._output.read().decode(errors="replace").strip()
        return f"; its last words:\n{text[-_SHOWN:]}" if text else " without a word"


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"crashed ({name})"


def _environment() -> dict[str, str]:
    """This process's, without what changes CuTe DSL's code: it is not part of a binary's key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    return {**kept, "CUTE_DSL_DISABLE_FILE_CACHING": "1", "OMP_NUM_THREADS": "1"}


def serve(descriptor: int) -> None:
    """The compiler's side: answer until the other end is closed."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection: Connection[Any, Any] = Connection(descriptor)
    with connection:
        while True:
            try:
                definition, arch = connection.recv()
            except EOFError:
                return
            except Exception as error:  # a class or function that is not found here
                connection.send(f"its definition cannot be imported: {error!r}")
                continue
            connection.send(_answer(definition, arch))


def _answer(definition: KernelDefinition, arch: str) -> Artifacts | str:
    try:
        return compile_here(definition, arch)
    except Exception as error:  # every error of the tool chain is an answer
        logger.debug("%s", definition.name, exc_info=True)
        return f"{type(error).__name__}: {error}"
