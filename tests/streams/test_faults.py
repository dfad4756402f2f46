"""Workers that do not come back: nobody waits for ever, and the next batch is right again."""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.records import MAX_POSTS, RING, Mailbox
from hybrid_moe.cpu_kernels.streams import graph_job
from hybrid_moe.cpu_kernels.streams.watcher import Watcher
from hybrid_moe.streams.buffers import Mailboxes
from hybrid_moe.streams.faults import check_errors
from tests.streams.emulation import Device
from tests.streams.model import Inputs, ManualWatcher, Model

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_job, "TIMEOUT_S", 0.03)


def model_without_workers(flags: bool) -> Model:
    model = Model(flags=flags)
    model.gpu.would_block = lambda function, user_data: False  # callbacks wait themselves
    model.gpu.agents = [(1.0, watching(model))]
    model.gpu.run_some = lambda steps: None  # type: ignore[method-assign]
    return model


def watching(model: Model) -> Callable[[], bool]:
    """The watcher, and time that goes by."""

    def step() -> bool:
        return model.watcher.look() or any(
            model.watcher.control.posts[i].graph_job.address
            for i in range(model.watcher.control.count.value)
        )

    return step


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.usefixtures("impatient")
def test_a_dead_worker_fails_the_batch_and_not_the_process(flags: bool, captured: bool) -> None:
    model = model_without_workers(flags)
    if captured:
        model.replay(model.capture(2), seed=0)
    else:
        model.step(2, seed=0)
    model.gpu.run()
    assert all(check.got.isnan().all() for check in model.checks)
    with pytest.raises(RuntimeError) as raised:
        check_errors()
    assert str(raised.value) == (
        "layer 0: the CPU workers completed nothing for 0.03 s (and 2 more layers failed)"
    )
    check_errors()

    while model.group.work():  # they were only slow
        pass
    model.gpu.agents.append((1.0, model.group.work))
    model.gpu.would_block = model.group.would_block
    model.checks.clear()
    model.step(2, seed=3)
    model.verify()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("flags", [True, False])
def test_layers_after_a_dead_worker_do_not_wait_for_it(
    flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_without_workers(flags)
    step = model.capture(2)
    monkeypatch.setattr(graph_job, "TIMEOUT_S", 3600.0)
    patient = model.capture(2)
    for graph, reason in ((step, "nothing for 0.03 s"), (patient, "still busy"), (step, "still")):
        model.replay(graph, seed=0)
        model.gpu.run()
        with pytest.raises(RuntimeError, match=reason):
            check_errors()
    assert all(check.got.isnan().all() for check in model.checks)
    while model.group.work():
        pass


@pytest.mark.usefixtures("impatient")
def test_an_abandoned_job_writes_elsewhere() -> None:
    model = model_without_workers(flags=True)
    model.replay(model.capture(2), seed=0)
    model.gpu.run()
    ((buffers,),) = model.pool._captured.values()
    assert buffers.out.isnan().all()
    while model.group.work():
        pass
    assert buffers.out.isnan().all()
    with pytest.raises(RuntimeError):
        check_errors()


@pytest.mark.usefixtures("impatient")
def test_the_memory_of_an_abandoned_job_outlives_it() -> None:
    model = model_without_workers(flags=True)
    model.replay(model.capture(2), seed=0)
    model.gpu.run()
    runner: Any = model.runners[0]
    (job,) = map(weakref.ref, runner._stager._captured.values())
    ((buffers,),) = model.pool._captured.values()
    memory = weakref.ref(next(iter(buffers.memory.values()))._workspace)
    group = model.group
    del runner, model, buffers
    gc.collect()
    assert job() is None and memory() is not None
    while group.work():
        pass


def test_progress_of_others_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job behind long ones is not late as long as those complete."""
    monkeypatch.setattr(graph_job, "TIMEOUT_S", 0.2)
    model = Model(flags=True, count=1)
    for seed in range(8):
        model.step(1, seed)
    work, last = model.group.work, [time.monotonic()]

    def slowly() -> bool:
        if time.monotonic() - last[0] < 0.05:
            return True
        last[0] = time.monotonic()
        return work()

    model.gpu.agents = [(1.0, slowly), (1.0, model.watcher.look)]
    model.verify()
    check_errors()


# The thread -------------------------------------------------------------------------------------


class Client:
    """A stream's end of a mailbox, and a graph job to post."""

    def __init__(self, watcher: Watcher) -> None:
        self.model = Model(count=1)
        self.mailbox = Mailbox.new()
        assert watcher.add(self.mailbox.address, self.mailbox)
        runner: Any = self.model.runners[0]
        given = Inputs.random(2, 0)
        job = runner._stager.submit(self.model.streams[0], *given.tensors)
        self.model.gpu.agents = []
        self.model.gpu.run()  # the copies; and a post that nobody reads
        self.job, self.out = job.graph_job, job.buffers.out[:2]

    def post(self) -> None:
        self.mailbox.posted.value = self.job.user_data

    def finish(self) -> None:
        """Wait for the answer, and clear it."""
        end = time.monotonic() + 30
        while self.mailbox.done.value == 0:
            assert time.monotonic() < end, "no answer"
            self.model.group.work()
        assert self.mailbox.words.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
        self.mailbox.done.value = 0


@pytest.mark.parametrize("hot_ns", [0, 10**9])
def test_the_thread_answers(hot_ns: int) -> None:
    watcher = Watcher(hot_ns=hot_ns)
    client, expected = Client(watcher), None
    watcher.start()
    for _ in range(20):
        client.out.fill_(float("nan"))
        client.post()
        client.finish()
        expected = client.out.clone() if expected is None else expected
        assert torch.equal(client.out, expected) and not client.out.isnan().any()
        time.sleep(0.001)
    watcher.stop()
    assert watcher._thread is not None and not watcher._thread.is_alive()


def test_stopping_releases_streams() -> None:
    watcher = Watcher()
    client = Client(watcher)
    watcher.start()
    client.post()
    while client.mailbox.posted.value != 0:
        time.sleep(0.001)
    watcher.stop()
    assert client.mailbox.done.value == 1 and client.out.isnan().all()
    with pytest.raises(RuntimeError, match="the CPU workers have been stopped"):
        check_errors()
    while client.model.group.work():
        pass


def test_the_process_has_one_watcher() -> None:
    from hybrid_moe.cpu_kernels.streams.watcher import watcher

    assert watcher() is watcher()


def test_too_many_mailboxes(caplog: pytest.LogCaptureFixture) -> None:
    watcher = ManualWatcher()
    mailboxes = Mailboxes(lambda: watcher)
    stream = Device(random.Random(0)).stream()
    taken = [mailboxes.take(stream) for _ in range(MAX_POSTS)]
    addresses = {box.posted.address for box in taken if box is not None}
    assert len(addresses) == MAX_POSTS
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        assert mailboxes.take(stream) is None
        assert mailboxes.take(stream) is None
    assert [record.getMessage() for record in caplog.records] == [
        "too many mailboxes: further buffers are handed over by host functions"
    ]


@pytest.mark.usefixtures("impatient")
def test_a_full_ring_makes_a_post_wait_and_give_up() -> None:
    """Host functions only: the watcher never waits."""
    model = model_without_workers(flags=False)
    for _ in range(RING - 1):
        runner: Any = model.runners[0]
        runner._stager.submit(model.streams[0], *Inputs.random(1, 0).tensors)
    model.gpu.run()
    group = model.group.control
    assert group.submitted.value - group.completed.value == RING - 1
    job = runner._stager.submit(model.streams[0], *Inputs.random(1, 0).tensors)
    model.gpu.run()
    assert group.submitted.value - group.completed.value == RING - 1
    with pytest.raises(RuntimeError, match="completed nothing for"):
        check_errors()
    assert job.buffers.out[:1].isnan().all()
    while model.group.work():
        pass
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    call(drivers.addresses()["post_host"])(job.graph_job.user_data)
    assert model.group.work() and not job.buffers.out[:1].isnan().any()
