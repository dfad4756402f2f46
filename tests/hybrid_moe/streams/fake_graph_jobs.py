"""Graph jobs without kernels: Python in place of the compiled host functions.

Addresses are real: the jobs read and write the pinned buffers by address, as compiled code does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.job import JobMemory, JobShape, capacity_for
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.streams.graph_job import Report

NOTHING = Report(0, 0, -1, None)


@dataclass
class FakeGraphJob:
    """Job: out = sum over slots of weight * (id + 1) * x, of ids in range that are not skipped."""

    user_data: int
    batch: Batch
    memory: JobMemory
    post_fn: int
    wait_fn: int
    posted: int = 0
    computed: int = 0
    epoch: int = 0
    announced: int = 0
    visits: int = 0
    skip: Any = None  # the mask as the latest post saw it

    def will_visit(self, *, captured: bool, number: int = 1) -> None:
        self.announced += 0 if captured else number

    @property
    def progress(self) -> FakeGraphJob:
        return self

    @property
    def idle(self) -> bool:
        return self.visits >= self.announced


@dataclass
class FakeLayer:
    """A layer whose jobs run as late as allowed: in the wait."""

    hidden: int
    experts: int
    functions: dict[int, Callable[[int], object]] = field(default_factory=dict)
    jobs: dict[int, FakeGraphJob] = field(default_factory=dict)
    next_report: Report = NOTHING
    log: list[tuple[str, int]] = field(default_factory=list)
    pool: PoolConfig = field(default_factory=lambda: PoolConfig(1))

    def __post_init__(self) -> None:
        self.functions[id(self)] = self._post
        self.functions[id(self) + 1] = self._wait

    @property
    def num_experts(self) -> int:
        return self.experts

    def job_shape(self, tokens: int, top_k: int, out_size: int = 2) -> JobShape:
        return JobShape(capacity_for(tokens), top_k, self.experts, self.hidden, 64, 64, 64, 1, 1)

    def graph_job(self, batch: Batch, memory: JobMemory, **_: Any) -> FakeGraphJob:
        number = len(self.jobs)
        self.jobs[number] = FakeGraphJob(number, batch, memory, id(self), id(self) + 1)
        return self.jobs[number]

    def report(self) -> Report:
        report, self.next_report = self.next_report, NOTHING
        return report

    def _post(self, number: int) -> None:
        job = self.jobs[number]
        assert job.posted == job.computed, "posted again before it was waited for"
        job.posted += 1
        job.visits += 1
        job.skip = self._view(job.batch.skip, "?", self.experts).copy()
        self.log.append(("post", number))

    def _wait(self, number: int) -> None:
        job = self.jobs[number]
        job.visits += 1
        self.log.append(("wait", number))
        if job.computed == job.posted:
            return
        job.computed = job.posted
        batch = job.batch
        tokens, k = batch.tokens, batch.top_k
        bits = self._view(batch.x, np.uint16, tokens, self.hidden)
        ids = self._view(batch.ids, np.int64, tokens, k)
        weights = self._view(batch.weights, np.float32, tokens, k)
        valid = (ids >= 0) & (ids < self.experts)
        valid &= ~job.skip[np.where(valid, ids, 0)]
        factor = (weights * np.where(valid, ids + 1, 0)).sum(1, keepdims=True)
        y = bits.view(ml_dtypes.bfloat16).astype(np.float32) * factor
        out = self._view(batch.out, np.uint16, tokens, self.hidden)
        out[:] = y.astype(ml_dtypes.bfloat16).view(np.uint16)

    @staticmethod
    def _view(address: int, dtype: Any, *shape: int) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(buffer, dtype).reshape(shape)


def job_of(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the fake job computes, for valid ids."""
    factor = (weights.float() * (ids + 1)).sum(1, keepdim=True)
    return (hidden.float() * factor).to(torch.bfloat16)


def random_batch(
    tokens: int, experts: int, top_k: int, hidden: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights, of types that the copy to the host converts."""
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=rng).to(torch.bfloat16),
        torch.randint(0, experts, (tokens, top_k), generator=rng, dtype=torch.int32),
        torch.randint(1, 8, (tokens, top_k), generator=rng).to(torch.bfloat16) / 8,
    )
