"""The emulation finds ordering bugs: each of these, put into the hand-over, makes programs fail."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_moe.streams.buffers import BufferPool, Buffers
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.staging import Stager, StreamJob
from tests.streams.emulation import SIDE_HANDLES, CaptureError, DeadlockError, EmulatedStream
from tests.streams.programs import Program

Failure = (AssertionError, CaptureError)

ACTIONS: dict[int, tuple[tuple[object, ...], ...]] = {
    0: (("step", 2, 0, None), ("step", 1, 0, 1), ("graph", 2, False, 3), ("step", 2, 0, None)),
    1: (("step", 2, 0, None), ("graph", 2, False, 3), ("graph", 1, True, 3)),
}
"""By the number of deferred experts."""


def battery(flags: bool | None = None, deferred: int | None = None) -> list[Program]:
    """Programs that exercise everything, with workers and watcher quick and slow."""
    ways = [True, False] if flags is None else [flags]
    numbers = [0, 1] if deferred is None else [deferred]
    return [
        Program(0, way, channels, number, 3, haste, ACTIONS[number])
        for way, number, channels, haste in itertools.product(
            ways, numbers, (None, 1), ((0.02, 1.0), (1.0, 0.02), (30.0, 30.0))
        )
    ]


def is_side(stream: EmulatedStream) -> bool:
    """Whether it is the private stream of another."""
    return stream.handle >= SIDE_HANDLES


def failures(programs: list[Program]) -> set[str]:
    """The kinds of failures among `programs`, as names of exceptions."""
    found = set()
    for program in programs:
        try:
            program.run()
        except Failure as failure:
            found.add(type(failure).__name__)
    return found


def test_no_mutation() -> None:
    assert not failures(battery())


def drop_wait(monkeypatch: pytest.MonkeyPatch, dropped: Callable[[str, bool], bool]) -> None:
    """Leave out waits for events: (the function that asks for it, whether by the side stream)."""
    real = EmulatedStream.wait

    def wait(self: EmulatedStream, event: Any) -> None:
        if not dropped(sys._getframe(1).f_code.co_name, is_side(self)):
            real(self, event)

    monkeypatch.setattr(EmulatedStream, "wait", wait)


@pytest.mark.parametrize("flags", [True, False])
def test_dropped_wait_before_the_inputs_are_copied(
    flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_wait(monkeypatch, lambda where, side: side)
    assert failures(battery(flags))


@pytest.mark.parametrize("flags", [True, False])
def test_dropped_wait_for_the_copies(flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stager.submit

    def submit(self: Stager, stream: EmulatedStream, *args: Any, **kwargs: Any) -> StreamJob:
        waits, wait = [], EmulatedStream.wait

        def record(me: EmulatedStream, event: Any) -> None:
            if me is stream:
                waits.append(event)
                if len(waits) == 1:
                    return
            wait(me, event)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EmulatedStream, "wait", record)
            return real(self, stream, *args, **kwargs)

    monkeypatch.setattr(Stager, "submit", submit)
    assert "AssertionError" in failures(battery(flags))


def test_dropped_wait_for_the_post(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_wait(monkeypatch, lambda where, side: where == "_wait")
    eager = [replace(p, actions=ACTIONS[0][:2]) for p in battery(flags=False, deferred=0)]
    assert "AssertionError" in failures(eager)  # the callback that waits came before the post
    assert "CaptureError" in failures(battery(flags=True))  # a graph ended with a loose stream


def test_dropped_join_of_deferred_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stager.submit

    def submit(self: Stager, *args: Any, join: bool = False, **kwargs: Any) -> StreamJob:
        job = real(self, *args, join=False, **kwargs)
        job.joined = join
        return job

    monkeypatch.setattr(Stager, "submit", submit)
    assert "CaptureError" in failures(battery(deferred=1))


def test_dropped_wait_for_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedStream, "wait_value", lambda self, address, value: None)
    assert "AssertionError" in failures(battery(flags=True))


def test_dropped_wait_for_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host function that waits is left out."""
    real = EmulatedStream.host_function

    def host_function(self: EmulatedStream, function: int, user_data: int) -> None:
        if is_side(self):  # posts
            real(self, function, user_data)

    monkeypatch.setattr(EmulatedStream, "host_function", host_function)
    assert "AssertionError" in failures(battery(flags=False))


@pytest.mark.parametrize("flags", [True, False])
def test_early_buffer_reuse(flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are free for the next submission before the result is collected."""
    real, give_back = Stager.submit, BufferPool.give_back

    def submit(self: Stager, *args: Any, **kwargs: Any) -> StreamJob:
        job = real(self, *args, **kwargs)
        give_back(job.pool, job.buffers, job.stream)
        return job

    monkeypatch.setattr(Stager, "submit", submit)
    monkeypatch.setattr(BufferPool, "give_back", lambda *args: None)
    assert failures(battery(flags, deferred=1))


@pytest.mark.parametrize("flags", [True, False])
def test_early_buffer_reuse_by_another_stream(flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers go back to the stream that submitted, though another one still waits and copies."""
    real, result = BufferPool.give_back, StreamJob.result

    def to_submitter(self: StreamJob, stream: Stream) -> torch.Tensor:
        def give_back(pool: BufferPool, buffers: Buffers, _: Stream) -> None:
            real(pool, buffers, self.stream)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BufferPool, "give_back", give_back)
            return result(self, stream)

    monkeypatch.setattr(StreamJob, "result", to_submitter)
    steps = tuple(("step", 2, 0, 1) for _ in range(4))
    programs = [
        Program(seed, flags, None, 0, 3, (haste, haste), steps)
        for seed in range(6)
        for haste in (0.02, 1.0)
    ]
    assert failures(programs)


def test_constant_replay_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag stays as the first run left it: a replay's wait is over before its job."""
    real = EmulatedStream.write_value

    def write_value(self: EmulatedStream, address: int, value: int) -> None:
        if value != 0:
            real(self, address, value)

    monkeypatch.setattr(EmulatedStream, "write_value", write_value)
    assert "AssertionError" in failures(battery(flags=True))


@pytest.mark.parametrize("flags", [True, False])
def test_callback_that_blocks_on_another_stream(
    flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side stream's callback waits for one that the caller's stream makes later."""
    real, waiting, answering = Stager.submit, 1, 2

    def submit(self: Stager, stream: EmulatedStream, *args: Any, **kwargs: Any) -> StreamJob:
        gpu, answered = stream.gpu, set[int]()
        may_block, number = gpu.would_block, len(gpu.python)
        gpu.python[number] = lambda _: None
        gpu.python[number + 1] = answered.add
        gpu.would_block = lambda function, data: (
            not answered if function == number else may_block(function, data)
        )
        stream.side.host_function(number, waiting)
        job = real(self, stream, *args, **kwargs)
        stream.host_function(number + 1, answering)
        return job

    monkeypatch.setattr(Stager, "submit", submit)
    assert DeadlockError.__name__ in failures(battery(flags))
