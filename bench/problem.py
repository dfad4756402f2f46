"""What every library computes, and how its calls are timed: shapes, random routing, a float64
reference, a clock that notices disturbance. Weights are in `weights`.

NumPy only, so that a peer's worker can run in an environment that has nothing else of ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

SOURCES = 4
"""Distinct random experts; the others are copies of them at addresses of their own."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer: hidden H, intermediate I, experts E, top-k, and gpt-oss's options.

    `experts` is what a benchmark allocates: enough to be far larger than any cache.
    """

    name: str
    model: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    biased: bool = False
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.intermediate

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of a call."""
        return tokens * self.top_k * self.weights_per_expert

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Output rows and inputs of each projection."""
        H, I = self.hidden, self.intermediate
        return {"gate": (I, H), "up": (I, H), "down": (H, I)}


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        s.name: s
        for s in (
            Shape("A", "DeepSeek-V4-Flash", 4096, 2048, 64, 6),
            Shape("B", "Qwen3-30B-A3B", 2048, 768, 128, 8),
            Shape("C", "gpt-oss-20b", 2880, 2880, 32, 4, biased=True, limit=7.0, alpha=1.702),
            Shape("D", "DeepSeek-V3", 7168, 2048, 24, 8),
            Shape("small", "accuracy only", 1024, 512, 8, 4),
        )
    }
)


def bf16_bits(x: Array) -> npt.NDArray[np.uint16]:
    """float32 -> bf16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def bf16_values(bits: Array) -> npt.NDArray[np.float32]:
    """bf16 bits -> float32."""
    values: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


@dataclass(frozen=True)
class Batch:
    """Inputs of one call: x bf16 bits [T, H], ids int64 [T, k] distinct, weights float32 [T, k]."""

    x: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    @property
    def distinct_experts(self) -> int:
        return len(np.unique(self.ids))


def random_batches(
    shape: Shape, tokens: int, count: int, seed: int, outliers: int = 0
) -> list[Batch]:
    """`count` batches; every token of every batch draws its experts anew.

    Args:
        outliers: this many channels of x are 40 times as large as the others.
    """
    rng = np.random.default_rng((seed, tokens))
    batches = []
    for _ in range(count):
        x = rng.standard_normal((tokens, shape.hidden), dtype=np.float32)
        x[:, rng.permutation(shape.hidden)[:outliers]] *= 40
        ids = np.argsort(rng.random((tokens, shape.experts)), axis=1)[:, : shape.top_k]
        weights = rng.random((tokens, shape.top_k), dtype=np.float32)
        weights /= weights.sum(1, keepdims=True)
        batches.append(Batch(bf16_bits(x), np.ascontiguousarray(ids, np.int64), weights))
    return batches


def batches_for(tokens: int) -> int:
    """Different batches per point: with one token each touches few experts, so take many."""
    return 64 if tokens == 1 else 16 if tokens <= 16 else 4


def expert_output(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate x) * up x) of float64 x [T, H] and float64 matrices [N, K]."""
    a = x @ gate.T
    y: Array = (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T
    return y


def reference(experts: Sequence[Mapping[str, Array]], batch: Batch) -> Array:
    """float64 [T, H]: plain SwiGLU experts, cyclically, of matrices by name."""
    x = bf16_values(batch.x).astype(np.float64)
    y = np.zeros_like(x)
    for i, expert in enumerate(experts):
        dense = {name: matrix.astype(np.float64) for name, matrix in expert.items()}
        tokens, slots = np.nonzero(batch.ids % len(experts) == i)
        weights = batch.weights[tokens, slots, None].astype(np.float64)
        np.add.at(y, tokens, weights * expert_output(x[tokens], **dense))
    return y


def relative_error(y: Array, expected: Array) -> float:
    """||y - expected|| / ||expected||."""
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


class OtherLoad:
    """Processor time that was not ours since this was made: other processes, other guests."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        ticks = user + nice + system + irq + softirq + steal
        own = os.times()
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return busy, own.user + own.system, time.perf_counter()

    def share(self) -> float:
        """As a part of all the machine's processors, 0 to 1."""
        busy, own, wall = self._now()
        others = (busy - self._busy) - (own - self._own)
        return max(0.0, others / ((wall - self._wall) * (os.cpu_count() or 1)))


@dataclass(frozen=True)
class Calls:
    """Seconds of each call, and the share of all processors that others had meanwhile."""

    seconds: list[float]
    others: float


def time_calls(call: Callable[[int], object], seconds: float, least: int = 3) -> Calls:
    """call(1), call(2), ... until `seconds` have passed, `least` of them at least; call(0) goes
    first and does not count."""
    call(0)
    samples: list[float] = []
    others = OtherLoad()
    begin = time.perf_counter()
    while len(samples) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call(len(samples) + 1)
        samples.append(time.perf_counter() - start)
    return Calls(samples, others.share())
