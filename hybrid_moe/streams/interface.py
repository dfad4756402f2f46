"""What the asynchronous path needs of a GPU's stream. No CUDA here.

`streams.cuda` implements it on the CUDA runtime; the tests have a second implementation that
executes stream order, events, host functions, memory flags and graphs in process, and permutes
whatever that order leaves open.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Event(Protocol):
    """A point in a stream's order that other streams can wait for."""


class Stream(AbstractContextManager[None], Protocol):
    """A queue of work of one GPU; while entered, it is torch's current stream.

    Each method but those that ask or allocate queues one piece of work and returns at once. While
    a graph is captured from the stream, the work goes into the graph instead.
    """

    @property
    def handle(self) -> int:
        """Tells streams apart."""

    @property
    def device(self) -> torch.device: ...

    @property
    def side(self) -> Stream:
        """A private stream of this one, always the same: work beside the caller's."""

    @property
    def has_flags(self) -> bool:
        """Whether `write_value` and `wait_value` work here, also in graphs."""

    def capturing(self) -> bool:
        """Whether a graph is being captured from this stream."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """New zeroed page-locked host memory that the GPU reaches too; allowed under capture."""

    def to_host(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` on the device, in the dtype of pinned `target`. Where its memory may be
        used again after the copy, the caller's stream must wait for that."""

    def to_device(self, source: torch.Tensor) -> torch.Tensor:
        """Copy pinned `source` into a new device tensor."""

    def add(self, target: torch.Tensor, other: torch.Tensor) -> None:
        """`target += other` on device tensors."""

    def record(self, *, timed: bool = False) -> Event:
        """The point that the stream has reached when all work queued so far is done. `timed`: its
        time is noted, for `seconds_between`; not under capture."""

    def passed(self, event: Event) -> bool:
        """Whether `event` has been reached."""

    def seconds_between(self, begin: Event, end: Event) -> float:
        """From one timed event to another, both of which have been reached."""

    def host_wait(self, event: Event) -> None:
        """Return when `event` has been reached. Not under capture."""

    def wait(self, event: Event) -> None:
        """Let what follows wait for `event`, of this stream's device."""

    def host_function(self, function: int, user_data: int) -> None:
        """Call the compiled function at address `function` on the host. One thread makes the calls
        of all streams; what follows in this stream waits until it returns."""

    def write_value(self, address: int, value: int) -> None:
        """Write an int64 into pinned memory, after all that the stream has done so far."""

    def wait_value(self, address: int, value: int) -> None:
        """Let what follows wait until an int64 in pinned memory has this value."""
