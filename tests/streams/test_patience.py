"""A pool is given up when it ends no task for as long as its largest task may take, and not before;
and those who wait hold up nobody."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import host, mailbox, patience, worker
from hybrid_moe.cpu_kernels.drivers.records import DOWN, GATE_UP, RING, GraphJob, Group, Phase
from hybrid_moe.cpu_kernels.jit.record import Word
from hybrid_moe.cpu_kernels.streams import graph_job
from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.streams.faults import check_errors
from tests.streams.interpreted import Clock, interpret
from tests.streams.model import H, I, Inputs, K, Model

SECOND = 10**9
TIMEOUT = int(graph_job.TIMEOUT_S) * SECOND


pytestmark = pytest.mark.usefixtures("clean")


def never() -> None:
    raise AssertionError("it waits")


class Waiter:
    """A job that has been posted, on the way to a pool that works only when a test says so."""

    def __init__(self, flags: bool, inputs: Inputs) -> None:
        self.model = model = Model(flags=flags, count=1)
        model.gpu.agents = [(1.0, model.watcher.look)]
        self.inputs = inputs
        runner: Any = model.runners[0]
        runner.submit(*inputs.tensors, 1)
        job = runner._submission.job
        self.posted, self.buffers = job.graph_job, job.buffers
        self.result = runner.sync(inputs.hidden, 1)
        model.gpu.run_some(200)
        group = model.group
        self.group = group.control
        self.sequence = self.group.submitted.value
        assert self.sequence == self.group.completed.value + 1
        self.entry = worker.ring_entry(self.group, self.sequence)
        self.graph_job = GraphJob.at(self.posted.user_data)

    @property
    def patience(self) -> int:
        """By the formula, in nanoseconds."""
        return TIMEOUT + self.entry.task_ns.value

    def phase(self, kind: int) -> Phase:
        """Its phase of this kind."""
        phases = map(self.entry.phases.__getitem__, range(self.entry.phase_count.value))
        (found,) = (phase for phase in phases if phase.kind == kind)
        return found

    def look(self) -> None:
        """The watcher looks."""
        mailbox.watch_once(self.model.watcher.control)

    @property
    def answered(self) -> bool:
        assert self.buffers.mailbox is not None
        return self.buffers.mailbox.done.value != 0

    def finish(self) -> None:
        """Let the pool work, and the stream run to its end."""
        while self.model.group.work():
            pass
        self.model.gpu.run()


def one_expert(tokens: int) -> Inputs:
    """Every token wants expert 1 once."""
    given = Inputs.random(tokens, 0)
    ids = torch.full((tokens, K), -1)
    ids[:, 0] = 1
    return Inputs(given.hidden, ids, given.weights)


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_the_formula(tokens: int) -> None:
    """Multiply-adds of the largest task at 1e8 a second: with one block of intermediate rows and
    one strip of outputs, counted with all its rows, a task is a whole matrix."""
    assert (H, I) == (32, 32)
    waiter = Waiter(False, one_expert(tokens))
    gate_up, down = tokens * 2 * I * H, tokens * STRIP_ROWS * I
    assert waiter.entry.task_ns.value == max(gate_up, down) * SECOND // 10**8
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, never)
        assert patience.patience_ns(waiter.graph_job) == waiter.patience
    waiter.finish()


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_no_task_is_larger_than_the_formula_says(tokens: int) -> None:
    """A task of average size is not, and all tasks together are at least the job."""
    given = Inputs.random(tokens, 1)
    waiter = Waiter(False, given)
    seconds = waiter.entry.task_ns.value / SECOND
    pairs = int((given.ids >= 0).sum())
    for kind, macs in ((GATE_UP, 2 * I * H * pairs), (DOWN, H * I * pairs)):
        tasks = waiter.phase(kind).total.value
        assert seconds * tasks >= macs / 1e8
    assert seconds <= 3 * I * H * K * tokens / 1e8
    waiter.finish()


def slow_pool(waiter: Waiter, clock: Clock, portion: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Work on the job as a thread that needs `portion` of the patience for a task, while the
    watcher looks; returns how many tasks it ended."""
    ended = []

    def run_task(*arguments: object) -> None:
        for _ in range(10):
            clock.pass_by(int(portion * waiter.patience / 10))
            waiter.look()
        ended.append(arguments)

    monkeypatch.setattr(worker, "run_task", run_task)
    monkeypatch.setattr(worker, "enter", lambda layer: 0)
    worker.participate(waiter.group, waiter.sequence, 0, 0, 0)
    waiter.look()
    return len(ended)


def test_an_honest_slow_pool_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiter = Waiter(True, Inputs.random(300, 2))
    clock = interpret(monkeypatch, never)
    tasks = slow_pool(waiter, clock, 0.95, monkeypatch)
    assert tasks > 10 and clock.ahead > 9 * waiter.patience  # nothing of this was waited for
    assert waiter.answered
    waiter.model.gpu.run()
    check_errors()


def test_a_pool_that_is_slower_than_the_formula_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiter = Waiter(True, Inputs.random(300, 2))
    clock = interpret(monkeypatch, never)
    slow_pool(waiter, clock, 1.2, monkeypatch)
    waiter.model.gpu.run()
    assert waiter.result.isnan().all()
    with pytest.raises(RuntimeError, match="layer 0: the CPU workers completed nothing for 60"):
        check_errors()


@pytest.mark.parametrize("tokens", [1, 700])
def test_a_dead_pool_is_found_after_its_patience(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiter = Waiter(True, Inputs.random(tokens, 2))
    clock = interpret(monkeypatch, never)
    waiter.look()
    clock.pass_by(waiter.patience - 30 * SECOND)  # the test itself takes less than that
    waiter.look()
    assert not waiter.answered
    clock.pass_by(30 * SECOND)
    waiter.look()
    assert waiter.answered
    waiter.model.gpu.run()
    assert waiter.result.isnan().all()
    with pytest.raises(RuntimeError, match="completed nothing"):
        check_errors()


@pytest.mark.parametrize("portion,error", [(0.95, False), (1.2, True)])
def test_host_functions_wait_as_long(
    portion: float, error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiter = Waiter(False, Inputs.random(300, 2))
    clock = interpret(monkeypatch, lambda: clock.pass_by(SECOND))
    done = [0]

    def help_until(group: Group, sequence: int, *_: int) -> bool:
        """One task of the pool's, then a look whether all are done."""
        clock.pass_by(int(portion * waiter.patience))
        host.fetch_add(waiter.phase(GATE_UP).done, 1)
        done[0] += 1
        if done[0] < 20:
            return False
        host.store_release(group.completed, sequence)
        return True

    if error:
        monkeypatch.setattr(host, "fetch_add", lambda word, value: None)
    monkeypatch.setattr(host, "help_until", help_until)
    host.wait(waiter.graph_job)
    assert (done[0] == 20) is not error
    assert waiter.graph_job.abandoned.value == (waiter.sequence if error else 0)
    if error:
        waiter.group.completed.value = waiter.group.abandoned.value = waiter.sequence
    waiter.model.gpu.run()


# Giving up --------------------------------------------------------------------------------------


@contextmanager
def worker_inside_a_task(waiter: Waiter) -> Iterator[Callable[[], None]]:
    """A worker has taken a task of the last phase, and leaves it when the given function is called.
    Afterwards nobody has."""
    phase = waiter.phase(DOWN)
    claims, done = phase.claims[0], phase.done

    def leave() -> None:
        done.value += 1

    before = claims.value, done.value
    claims.value += 1
    try:
        yield leave
    finally:
        claims.value, done.value = before


def test_a_worker_inside_a_task_cannot_spoil_the_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read where the output goes before the job was given up, and writes after that."""
    waiter = Waiter(True, Inputs.random(3, 2))
    clock = interpret(monkeypatch, never)
    out = waiter.entry.job.out.value
    assert out == waiter.buffers.out.data_ptr()
    with worker_inside_a_task(waiter) as leave:
        clock.pass_by(waiter.patience + SECOND)
        for _ in range(3):
            waiter.look()
        assert waiter.entry.job.out.value != out and not waiter.answered
        ctypes.memset(out, 0x3F, 2 * H * 3)
        leave()
        waiter.look()
        assert waiter.answered and waiter.buffers.out[:3].isnan().all()
    waiter.finish()
    assert waiter.result.isnan().all()
    with pytest.raises(RuntimeError, match="completed nothing"):
        check_errors()


def test_a_worker_that_stands_still_inside_a_task_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiter = Waiter(True, Inputs.random(3, 2))
    clock = interpret(monkeypatch, never)
    with worker_inside_a_task(waiter):
        clock.pass_by(waiter.patience + SECOND)
        waiter.look()
        assert not waiter.answered
        clock.pass_by(TIMEOUT // 8 + SECOND)
        waiter.look()
        assert waiter.answered and waiter.buffers.out[:3].isnan().all()
    waiter.finish()
    with pytest.raises(RuntimeError, match="completed nothing"):
        check_errors()


def test_the_newest_job_that_was_given_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watcher and host function give up two jobs at a time, in whichever order."""
    interpret(monkeypatch, never)
    word = Group.new().abandoned
    swap = host.compare_swap

    def interrupted(word: Word, expected: int, desired: int) -> bool:
        monkeypatch.setattr(host, "compare_swap", swap)
        word.value = 9  # the other one, between the look and the store
        return bool(swap(word, expected, desired))

    monkeypatch.setattr(host, "compare_swap", interrupted)
    host.raise_word(word, 7)
    assert word.value == 9
    host.raise_word(word, 12)
    assert word.value == 12


# A full ring ------------------------------------------------------------------------------------


def test_a_launch_that_finds_no_room_after_all_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last entry goes to somebody else between the look and the launch; the pool is dead."""
    model = Model(flags=True, count=1)
    model.gpu.agents = [(1.0, model.watcher.look)]
    for seed in range(RING - 1):
        model.runners[0]._stager.submit(model.streams[0], *Inputs.random(1, seed).tensors)  # type: ignore[union-attr]
    model.gpu.run()
    late = model.runners[0]._stager.submit(model.streams[0], *Inputs.random(1, 0).tensors)  # type: ignore[union-attr]
    model.gpu.run()  # accepted, and there is no room
    group = model.group.control
    assert group.submitted.value - group.completed.value == RING - 1
    clock = interpret(monkeypatch, never)
    monkeypatch.setattr(mailbox, "has_room", lambda group: True)
    mailbox.watch_once(model.watcher.control)
    assert group.lock.value == 0 and group.submitted.value - group.completed.value == RING - 1
    assert GraphJob.at(late.graph_job.user_data).mask.lock.value == 0
    clock.pass_by(2 * TIMEOUT)
    for _ in range(2):
        mailbox.watch_once(model.watcher.control)
    assert late.buffers.out[:1].isnan().all()
    with pytest.raises(RuntimeError, match="the CPU workers"):
        check_errors()


def test_a_post_that_finds_no_room_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(flags=False, count=1)
    model.gpu.agents = []
    model.gpu.would_block = lambda function, user_data: False
    for seed in range(RING - 1):
        model.runners[0]._stager.submit(model.streams[0], *Inputs.random(1, seed).tensors)  # type: ignore[union-attr]
    model.gpu.run()
    clock = interpret(monkeypatch, never)
    oldest = model.group.control.completed.value + 1

    def help_until(group: Group, sequence: int, *_: int) -> bool:
        """Sleeps for a while in vain."""
        assert sequence == oldest
        clock.pass_by(10 * SECOND)
        return False

    monkeypatch.setattr(host, "help_until", help_until)
    monkeypatch.setattr(host, "has_room", lambda group: True)
    model.gpu.python[drivers.addresses()["post_host"]] = lambda at: host.post_host(GraphJob.at(at))
    late = model.runners[0]._stager.submit(model.streams[0], *Inputs.random(1, 0).tensors)  # type: ignore[union-attr]
    model.gpu.run()
    assert late.buffers.out[:1].isnan().all() and TIMEOUT <= clock.ahead < 2 * TIMEOUT
    with pytest.raises(RuntimeError, match="completed nothing"):
        check_errors()
