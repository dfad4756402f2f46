"""Job slots without kernels: Python in place of the compiled host functions.

Addresses are real: the slots read and write the pinned buffers by address, as compiled code does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch

from hybrid_moe.cpu_kernels.job import JobShape, capacity_for
from hybrid_moe.cpu_kernels.streams.slots import SlotReport

NOTHING = SlotReport(0, 0, -1, None)


@dataclass
class FakeSlot:
    """Job: out = sum over slots of weight * (id + 1) * x, of ids in range that are not skipped."""

    user_data: int
    arguments: dict[str, Any]
    post_fn: int
    wait_fn: int
    posted: int = 0
    computed: int = 0
    epoch: int = 0
    announced: int = 0
    visits: int = 0

    def will_visit(self, *, captured: bool, number: int = 1) -> None:
        self.announced += 0 if captured else number

    @property
    def state(self) -> FakeSlot:
        return self

    @property
    def idle(self) -> bool:
        return self.visits >= self.announced


@dataclass
class FakeMaker:
    """Makes slots. The job runs as late as allowed: in the wait."""

    hidden: int
    experts: int
    functions: dict[int, Callable[[int], object]] = field(default_factory=dict)
    slots: dict[int, FakeSlot] = field(default_factory=dict)
    report: SlotReport = NOTHING
    log: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.functions[id(self)] = self._post
        self.functions[id(self) + 1] = self._wait

    def slot_shape(self, tokens: int, top_k: int) -> JobShape:
        return JobShape(capacity_for(tokens), top_k, self.experts, self.hidden, 64, 64, 64, 1, 1)

    def job_slot(self, **arguments: Any) -> FakeSlot:
        number = len(self.slots)
        self.slots[number] = FakeSlot(number, arguments, id(self), id(self) + 1)
        return self.slots[number]

    def slot_report(self) -> SlotReport:
        report, self.report = self.report, NOTHING
        return report

    def _post(self, number: int) -> None:
        slot = self.slots[number]
        assert slot.posted == slot.computed, "posted again before it was waited for"
        slot.posted += 1
        slot.visits += 1
        slot.arguments["snapshot"] = self._view(slot.arguments["skip"], "?", self.experts).copy()
        self.log.append(("post", number))

    def _wait(self, number: int) -> None:
        slot = self.slots[number]
        slot.visits += 1
        self.log.append(("wait", number))
        if slot.computed == slot.posted:
            return
        slot.computed = slot.posted
        a = slot.arguments
        tokens, k = a["tokens"], a["top_k"]
        bits = self._view(a["x"], np.uint16, tokens, self.hidden)
        ids = self._view(a["ids"], np.int64, tokens, k)
        weights = self._view(a["weights"], np.float32, tokens, k)
        valid = (ids >= 0) & (ids < self.experts)
        valid &= ~a["snapshot"][np.where(valid, ids, 0)]
        factor = (weights * np.where(valid, ids + 1, 0)).sum(1, keepdims=True)
        y = bits.view(ml_dtypes.bfloat16).astype(np.float32) * factor
        out = self._view(a["out"], np.uint16, tokens, self.hidden)
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
