"""The way of experts to the GPU's memory: copies in order, beside everything else.

On CUDA tensors the link is a stream of its own, whose copies the GPU makes by itself out of
page-locked arenas; where the system refused to lock them, the driver takes them through its ring of
pinned buffers, on the time of the host thread that asks. On CPU tensors (the torch back end, whose
slots are in the host's memory) it is a thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from hybrid_moe.locks import ProcessLock
from hybrid_moe.streams.interface import Event, Stream

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Targets on the device, and their sources in the host's memory, of equal sizes."""


Anchor = tuple[Event, int]
"""A timed event of the device, and what the host's clock said when it was reached."""


class Transfer(Protocol):
    """Copies on their way."""

    @property
    def nbytes(self) -> int: ...

    @property
    def done(self) -> bool:
        """Whether they have arrived."""

    @property
    def seconds(self) -> float | None:
        """How long they took from the first byte to the last; None until they have arrived."""

    def span(self, anchor: Anchor | None) -> tuple[int, int] | None:
        """From when to when, `time.monotonic_ns`; None until they have arrived, and where a stream
        has no `anchor`."""

    def wait(self, stream: Stream | None) -> None:
        """Let what follows on `stream` wait for them; None: the calling thread waits.

        Raises:
            RuntimeError: they failed.
        """


class Link(Protocol):
    """Carries experts, in the order in which they are sent."""

    def send(self, copies: Copies, after: Sequence[Event]) -> Transfer:
        """Queue copies, which wait for `after`. Sources and targets live until they are done."""

    @property
    def queued_bytes(self) -> int:
        """Sent, and not arrived."""

    def arrived(self) -> list[Transfer]:
        """Those that have arrived since the last call, in order."""

    def close(self) -> None:
        """Wait for all of them."""


class _Queue:
    """Transfers in order, until somebody has asked for them."""

    def __init__(self) -> None:
        self._sent: deque[Transfer] = deque()

    @property
    def queued_bytes(self) -> int:
        """Sent, and not arrived."""
        return sum(transfer.nbytes for transfer in list(self._sent) if not transfer.done)

    def arrived(self) -> list[Transfer]:
        """Those that have arrived since the last call."""
        found = []
        while self._sent and self._sent[0].done:
            found.append(self._sent.popleft())
        return found


class HostTransfer:
    """Copies that a thread makes."""

    def __init__(self, copies: Copies) -> None:
        self.copies: Copies = copies
        self.nbytes = sum(source.numel() * source.itemsize for _, source in copies)
        self._span: tuple[int, int] | None = None
        self.error: BaseException | None = None
        self._over = threading.Event()

    @property
    def done(self) -> bool:
        """Whether they are over."""
        return self._over.is_set()

    @property
    def seconds(self) -> float | None:
        """How long they took."""
        return None if self._span is None else (self._span[1] - self._span[0]) / 1e9

    def span(self, anchor: Anchor | None = None) -> tuple[int, int] | None:
        """From when to when."""
        return self._span

    def end(self, begin: int, error: BaseException | None) -> None:
        """They are over; of the link's thread."""
        self._span, self.error, self.copies = (begin, time.monotonic_ns()), error, ()
        self._over.set()

    def wait(self, stream: Stream | None) -> None:
        """The calling thread waits."""
        while not self._over.wait(0.05):  # Ctrl-C works
            continue
        if self.error is not None:
            raise RuntimeError(f"experts could not be copied: {self.error}") from self.error


class HostLink(_Queue):
    """A thread that copies. What is sent is in use from then on: there is no `after`."""

    def __init__(self) -> None:
        super().__init__()
        self._work: queue.SimpleQueue[HostTransfer] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = ProcessLock()

    def send(self, copies: Copies, after: Sequence[Event] = ()) -> HostTransfer:
        """Queue copies."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="hybrid_moe link")
                self._thread.daemon = True
                self._thread.start()
        transfer = HostTransfer(copies)
        self._sent.append(transfer)
        self._work.put(transfer)
        return transfer

    def _run(self) -> None:
        while True:
            transfer = self._work.get()
            begin, error = time.monotonic_ns(), None
            try:
                self.carry(transfer.copies)
            except Exception as problem:  # raised to whoever waits
                error = problem
            transfer.end(begin, error)

    def carry(self, copies: Copies) -> None:
        """Make copies; of the thread."""
        for target, source in copies:
            target.copy_(source)

    def close(self) -> None:
        """Wait for what was sent."""
        for transfer in list(self._sent):
            while not transfer.done:
                time.sleep(1e-4)
        self._sent.clear()


class StreamTransfer:
    """Copies that a stream makes."""

    def __init__(self, stream: Stream, copies: Copies, begin: Event, end: Event) -> None:
        self.nbytes = sum(source.numel() * source.itemsize for _, source in copies)
        self._stream, self._begin, self._end = stream, begin, end
        self._copies: Copies = copies

    @property
    def done(self) -> bool:
        """Whether the stream has made them."""
        if self._copies and self._stream.passed(self._end):
            self._copies = ()
        return not self._copies

    @property
    def seconds(self) -> float | None:
        """How long they took."""
        return self._stream.seconds_between(self._begin, self._end) if self.done else None

    def span(self, anchor: Anchor | None) -> tuple[int, int] | None:
        """From when to when, by the anchor."""
        if anchor is None or not self.done:
            return None
        event, now = anchor
        begin, end = (
            now + round(1e9 * self._stream.seconds_between(event, moment))
            for moment in (self._begin, self._end)
        )
        return begin, end

    def wait(self, stream: Stream | None) -> None:
        """Let `stream` wait."""
        assert stream is not None
        stream.wait(self._end)

    def wait_here(self) -> None:
        """The calling thread waits."""
        if not self.done:
            self._stream.host_wait(self._end)


class StreamLink(_Queue):
    """A stream that does nothing else."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def send(self, copies: Copies, after: Sequence[Event] = ()) -> StreamTransfer:
        """Queue copies behind `after`."""
        for event in after:
            self._stream.wait(event)
        begin = self._stream.record(timed=True)
        with self._stream:
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        transfer = StreamTransfer(self._stream, copies, begin, self._stream.record(timed=True))
        self._sent.append(transfer)
        return transfer

    def close(self) -> None:
        """Wait for what was sent."""
        for transfer in list(self._sent):
            assert isinstance(transfer, StreamTransfer)
            transfer.wait_here()
        self._sent.clear()


def link_to(device: torch.device) -> Link:
    """The link to a device's memory."""
    if device.type == "cpu":
        return HostLink()
    from hybrid_moe.streams.cuda import new_stream

    return StreamLink(new_stream(device))
