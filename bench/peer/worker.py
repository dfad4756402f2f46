"""A process that holds one library and does what `bench/peers.py` tells it over a pipe."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from problem import (
    SHAPES,
    batches_for,
    random_batches,
    reference,
    relative_error,
    time_calls,
)
from weights import random_experts, stored_method

from peer.interface import Peer
from peer.pipe import answer_commands

PEERS = {
    "ours": ("peer.ours", "Ours"),
    "kt-kernel": ("peer.kt", "KtKernel"),
    "torch": ("peer.torch_eager", "TorchEager"),
    "ggml": ("peer.ggml", "Ggml"),
}


class Worker:
    """Answers commands; `setup` comes first."""

    def __init__(self, name: str) -> None:
        module, self._class_name = PEERS[name]
        self._module = module
        self._peer: Peer | None = None

    def setup(self, shape: str, method: str, threads: int, max_tokens: int) -> dict[str, Any]:
        """Load the layer."""
        self._shape, self._method = SHAPES[shape], method
        peer = getattr(importlib.import_module(self._module), self._class_name)
        own = method if self._class_name == "Ours" else stored_method(method)
        self._peer = peer(self._shape, own, threads, max_tokens)
        assert self._peer is not None
        return {"label": self._peer.label}

    def prepare(self, tokens: int, seed: int) -> dict[str, Any]:
        """Get inputs ready and warm up; answers with the seconds of the first call."""
        assert self._peer is not None
        self._batches = random_batches(self._shape, tokens, batches_for(tokens), seed)
        self._peer.prepare(self._batches)
        start = time.perf_counter()
        self._peer.call(0)
        self._next = 1
        return {"seconds": time.perf_counter() - start}

    def run(self, seconds: float, least: int) -> dict[str, Any]:
        """Time calls; the first is a warm-up, since the process was stopped until now."""
        peer, first = self._peer, self._next
        assert peer is not None
        calls = time_calls(lambda i: peer.call((first + i) % len(self._batches)), seconds, least)
        self._next += 1 + len(calls.seconds)
        return {"samples": calls.seconds, "others": calls.others}

    def error(self, tokens: int, seed: int, outliers: int) -> dict[str, Any]:
        """||y - reference|| / ||reference|| against float64 on the dequantized weights, as the
        library holds them."""
        assert self._peer is not None
        batch = random_batches(self._shape, tokens, 1, seed, outliers)[0]
        held = self._peer.experts()
        if held is None:
            given = random_experts(self._shape, self._method)
            held = [{name: m.dequantize() for name, m in expert.items()} for expert in given]
        expected = reference(held, batch)
        self._peer.prepare([batch])
        self._peer.call(0)
        return {"error": relative_error(self._peer.output(), expected)}


if __name__ == "__main__":
    answer_commands(Worker(sys.argv[1]))
