"""A machine without a GPU whose parts take the time that another machine's would.

The runtime is real: wrappers, jobs, slots, the link's thread, deferral, the planner. Jobs and
copies are of layers so small that they take no time, and then wait until the seconds of the
timeline are over: the CPU's jobs one after another in the order of submission, the link's copies
likewise, the GPU's work on the calling thread, which plays the GPU's stream. Its arithmetic, which
the torch back end would do on this CPU, is left out, unless the machine is `exact`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from hybrid_moe import wrapper
from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.job import Job
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.trace_file import TraceNote
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.runtime import hot_half
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.schedule.layer_times import cpu_seconds, gpu_expert_seconds
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.streams.link import Copies, HostLink
from hybrid_moe.wrapper import KTMoEWrapper


class Measured:
    """Of what has been measured beside an ideal, both in seconds."""

    seconds: float
    ideal: float

    @property
    def ratio(self) -> float:
        """Measured over ideal."""
        return self.seconds / self.ideal


def attend(seconds: float, layer: int) -> None:
    """The GPU, that is the calling thread, is at the attention and the router of a layer."""
    begin = time.monotonic()
    until(begin + seconds)
    _trace("GPU", f"attention of layer {layer}", begin, time.monotonic())


def _trace(row: str, name: str, begin: float, end: float) -> None:
    row = row if row == "GPU" else f"{row}, emulated"
    trace.note(TraceNote(row, name, round(begin * 1e9), round(end * 1e9)))


AWAKE = 0.5e-3
"""Seconds. A thread that sleeps wakes 0.1 to 0.2 ms late on an idle machine: the end of every wait
is spent awake. No machine that is emulated would have lost that."""


def until(moment: float) -> None:
    """Return when `time.monotonic()` is `moment`."""
    while (left := moment - time.monotonic()) > 0:
        if left > AWAKE:
            time.sleep(left - AWAKE)


@dataclass
class ThrottledMachine:
    """Rates, and an expert as the machine sees it.

    Attributes:
        rates: of the machine that is emulated.
        expert: with the bytes and weights of the layers that really compute.
        exact: the GPU's results are right; else they are zeros.
        cpu_free: when the CPU is through with its jobs, in `time.monotonic`.
        link_free: when the link is through with its copies.
    """

    rates: MachineRates
    expert: ExpertWork
    exact: bool = False
    cpu_free: float = 0.0
    link_free: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def note(self, lane: str, seconds: float) -> None:
        """A lane is busy for so long."""
        self.spent[lane] = self.spent.get(lane, 0.0) + seconds

    def count(self, ids: np.ndarray[Any, Any], chosen: np.ndarray[Any, Any]) -> ExpertCount:
        """Of ids [T, k], those of experts of bool [E]."""
        flat = ids.reshape(-1)
        flat = flat[(flat >= 0) & (flat < len(chosen))]
        flat = flat[chosen[flat]]
        return ExpertCount(len(np.unique(flat)), len(flat))

    def cpu(self, count: ExpertCount) -> float:
        """Seconds of so many experts on the CPU."""
        return cpu_seconds(self.expert, count, self.rates) if count.experts else 0.0

    def submit(self, moment: float, count: ExpertCount, name: str) -> float:
        """The CPU got so many experts at a moment: when it will have computed them."""
        seconds = self.cpu(count)
        began = max(moment, self.cpu_free)
        self.cpu_free = began + seconds
        self.note("CPU", seconds)
        if seconds:
            _trace("CPU", f"{count.experts:.0f} experts of {name}", began, self.cpu_free)
        return self.cpu_free

    def gpu(self, began: float, count: ExpertCount) -> None:
        """The GPU, that is the calling thread, is at so many experts since `began`."""
        if count.experts:
            seconds = gpu_expert_seconds(self.expert, count, self.rates)
            self.note("GPU", seconds)
            until(began + seconds)

    def carry(self, moment: float, nbytes: int) -> float:
        """The link got so many bytes at a moment: when they will be there."""
        seconds = nbytes / self.rates.link
        self.note("link", seconds)
        self.link_free = max(moment, self.link_free) + seconds
        return self.link_free

    @contextmanager
    def emulated(self) -> Iterator[None]:
        """Within, slots are on this machine, and experts move over its link."""

        class Slots(ThrottledSlots):
            machine = self

        class Placement(ThrottledPlacement):
            machine = self

        with (
            mock.patch.object(hot_half, "SlotExperts", Slots),
            mock.patch.object(wrapper, "ExpertPlacement", Placement),
        ):
            yield


class ThrottledSlots(SlotExperts):
    """Slots of the emulated GPU."""

    machine: ThrottledMachine

    def sums(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        began = time.monotonic()
        if self.machine.exact:
            out = super().sums(x, ids, weights)
        else:
            out = x.new_zeros(x.shape, dtype=torch.float32)
        self.machine.gpu(began, self._count(ids))
        return out

    def rows(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        began = time.monotonic()
        if self.machine.exact:
            out = super().rows(x, ids)
        else:
            out = x.new_zeros((ids.numel(), x.shape[1]), dtype=torch.float32)
        self.machine.gpu(began, self._count(ids))
        return out

    def _count(self, ids: torch.Tensor) -> ExpertCount:
        return self.machine.count(ids.numpy(), self.slot_of.numpy() >= 0)


class ThrottledLink(HostLink):
    """The emulated link."""

    def __init__(self, machine: ThrottledMachine) -> None:
        super().__init__()
        self._machine = machine

    def carry(self, copies: Copies) -> None:
        began = time.monotonic()
        super().carry(copies)
        until(self._machine.carry(began, sum(source.numel() for _, source in copies)))


class ThrottledPlacement(ExpertPlacement):
    """Experts that move over the emulated link. As on a GPU, whoever moves one does not wait."""

    machine: ThrottledMachine

    def _copy(self, slots: SlotExperts, slot: int, expert: int, *, to_slot: bool) -> None:
        began, before = time.monotonic(), self.moved_bytes
        super()._copy(slots, slot, expert, to_slot=to_slot)
        self.machine.carry(began, self.moved_bytes - before)


class ThrottledJob(Job[Any]):
    """A job that is over no earlier than the emulated CPU says."""

    __slots__ = ("_ends", "_real")

    def __init__(self, real: Job[Any], ends: float) -> None:
        self._real, self._ends = real, ends
        self.tokens, self.ignored, self.missing = real.tokens, real.ignored, real.missing

    @property
    def done(self) -> bool:
        return self._real.done and time.monotonic() >= self._ends

    def wait(self) -> Any:
        output = self._real.wait()
        until(self._ends)
        return output


class ThrottledLayer(ExpertLayer):
    """Experts of the emulated CPU."""

    machine: ThrottledMachine
    _emulated = (0, 0.0)

    @property
    def busy(self) -> tuple[int, int]:
        return self._emulated[0], round(1e9 * self._emulated[1])

    def start(self, batch: Batch, output: Any) -> Job[Any]:
        submitted = time.monotonic()  # what is counted here to emulate it takes no time there
        tokens, k = batch.tokens, batch.top_k
        ids = _view(batch.ids, np.int64, tokens * k)
        skip = _view(batch.skip, np.uint8, self.num_experts).copy()
        count = self.machine.count(ids, skip == 0)
        ends = self.machine.submit(submitted, count, self.name)
        jobs, seconds = self._emulated
        self._emulated = jobs + 1, seconds + self.machine.cpu(count)
        return ThrottledJob(super().start(batch, output), ends)


def _view(address: int, dtype: Any, count: int) -> np.ndarray[Any, Any]:
    import ctypes

    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def throttled_wrapper(machine: ThrottledMachine, **arguments: Any) -> KTMoEWrapper:
    """A wrapper whose CPU is the machine's; its slots are too, if this is called in `emulated`."""

    class Layer(ThrottledLayer):
        pass

    Layer.machine = machine

    class Wrapper(KTMoEWrapper):
        def _new_layer(self) -> ExpertLayer:
            return Layer(
                self.formats,
                self.num_experts,
                self.hidden_size,
                self.moe_intermediate_size,
                pool=self.pool,
                activation=self.activation,
                isa=self._isa,
                name=f"layer {self.layer_idx}",
            )

    return Wrapper(**arguments)
