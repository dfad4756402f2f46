"""A process that holds one engine and does what `bench/end_to_end.py` tells it over a pipe."""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peer.pipe import answer_commands
from problem import OtherLoad

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from whole_model.clock import TokenClock
from whole_model.interface import Engine

ENGINES = {
    "ours": ("whole_model.torch_engines", "Ours"),
    "llama.cpp": ("whole_model.llama", "LlamaCpp"),
    "transformers": ("whole_model.torch_engines", "Eager"),
}
_SEED = 3

PROBE_BYTES = 256 << 20
"""Of the buffer that is read between tokens: far more than a cache holds."""


class Worker:
    """Answers commands; `setup` comes first."""

    def __init__(self, name: str) -> None:
        self._module, self._class = ENGINES[name]

    def setup(
        self, folder: str, weights: list[str], dense: str, threads: int, context: int,
        vocabulary: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Load the model."""
        made = getattr(importlib.import_module(self._module), self._class)
        start = time.perf_counter()
        files = [Path(file) for file in weights]
        self._engine: Engine = made(Path(folder), files, dense, threads, context)
        self._vocabulary = vocabulary
        self._probe = ReadProbe(threads, PROBE_BYTES)
        return {"label": self._engine.label, "load_s": time.perf_counter() - start}

    def run(self, context: int, new: int, computed: bool) -> dict[str, Any]:
        """Generate behind `context` random tokens, which are computed or are only in the cache."""
        rng = np.random.default_rng((_SEED, context))
        prompt: list[int] = rng.integers(0, self._vocabulary, context).tolist()
        clock, others = TokenClock(self._probe), OtherLoad()
        if computed:
            tokens = self._engine.generate(prompt, new, clock)
        else:
            tokens = self._engine.generate_behind(context, prompt[0], new, clock)
        return {
            "tokens": tokens,
            "prefill": clock.prefill,
            "seconds": clock.seconds,
            "reads": clock.reads,
            "others": others.share(),
        }

    def memory(self) -> dict[str, Any]:
        """The most memory that the process has held so far, without the probe's buffer."""
        status = Path("/proc/self/status").read_text()
        peak, anonymous = (
            1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])  # type: ignore[index]
            for name in ("VmHWM", "RssAnon")
        )
        return {"peak_rss": peak - PROBE_BYTES, "anonymous": anonymous - PROBE_BYTES}


if __name__ == "__main__":
    answer_commands(Worker(sys.argv[1]))
