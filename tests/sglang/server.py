"""A real SGLang server on the CPU, as a child process that a test starts, asks and kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from tests.sglang.paths import ROOT, SHIMS

START_SECONDS = 600.0

OPTIONS: dict[str, str | int] = {
    "--device": "cpu",
    "--dtype": "bfloat16",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--chunked-prefill-size": 64,
    "--max-total-tokens": 4096,
    "--context-length": 512,
    "--max-running-requests": 16,
    "--host": "127.0.0.1",
}
SWITCHES = (
    "--disable-radix-cache",
    "--skip-server-warmup",
    "--enable-fp32-lm-head",  # BF16 logits have steps of 0.125: every other choice would be a tie
)


@dataclass(frozen=True)
class Answer:
    """A greedy completion.

    Attributes:
        text: what was written. tokens: the same as tokens.
        margins: for each token, by how many nats it was ahead of the second best.
        finish: why it ended.
    """

    text: str
    tokens: tuple[str, ...]
    margins: tuple[float, ...]
    finish: str


@dataclass
class Server:
    """`python -m sglang.launch_server` with the shims of this folder.

    Args:
        model: the checkpoint that SGLang loads.
        options: added to `OPTIONS`, by name.
        environment: added to the process's own, None removes.
        log: file for what it prints.
        switches: options without a value, added to `SWITCHES`.
    """

    model: Path
    options: Mapping[str, str | int]
    environment: Mapping[str, str]
    log: Path
    switches: Sequence[str] = ()
    port: int = field(default_factory=lambda: free_port())
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and return when it answers."""
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        options = {**OPTIONS, "--port": self.port, **self.options}
        command += [str(word) for option in options.items() for word in option]
        command += [*SWITCHES, *self.switches]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HYBRID_MOE_")}
        if "HYBRID_MOE_CACHE_DIR" in os.environ:
            environment["HYBRID_MOE_CACHE_DIR"] = os.environ["HYBRID_MOE_CACHE_DIR"]
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": os.pathsep.join([str(SHIMS), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended at its start:\n{self.printed()[-6000:]}")
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server does not answer:\n{self.printed()[-6000:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill it and its children at once, as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def printed(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def complete(self, prompt: str, tokens: int, seconds: float = 300.0) -> Answer:
        """Greedy completion of exactly `tokens` tokens by the OpenAI-compatible endpoint."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 2,
            "ignore_eos": True,
        }
        choice = self._post("/v1/completions", body, seconds)["choices"][0]
        found = choice["logprobs"]
        margins = (sorted(best.values(), reverse=True) for best in found["top_logprobs"])
        return Answer(
            choice["text"],
            tuple(found["tokens"]),
            tuple(m[0] - m[1] if len(m) > 1 else 0.0 for m in margins),
            choice["finish_reason"],
        )

    def complete_all(self, prompts: Sequence[str], tokens: int, clients: int) -> list[Answer]:
        """`complete` for many prompts, `clients` at a time."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, tokens), prompts))

    def _post(self, path: str, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}{path}"
        reply = requests.post(url, json=body, timeout=seconds)
        if not reply.ok:
            raise RuntimeError(f"{path}: {reply.status_code}: {reply.text}")
        answer: dict[str, Any] = reply.json()
        return answer

    def _answers(self) -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok
        except requests.RequestException:
            return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
