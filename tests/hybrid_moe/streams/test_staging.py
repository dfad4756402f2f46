"""Order on a stream: capture of inputs, reuse of buffers, and graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hybrid_moe.streams import staging
from hybrid_moe.streams.buffers import BufferPool
from hybrid_moe.streams.staging import Stager
from tests.hybrid_moe.streams.fake_graph_jobs import FakeLayer, job_of, random_batch
from tests.streams.emulation import DEVICE, Device, EmulatedStream
from tests.streams.model import Model as KernelModel

E, K, H = 6, 2, 32


def batch(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_batch(tokens, E, K, H, seed)


@dataclass
class Setup:
    layer: FakeLayer = field(default_factory=lambda: FakeLayer(H, E))
    mask: torch.Tensor = field(default_factory=lambda: torch.zeros(E, dtype=torch.bool))
    pool: BufferPool = field(default_factory=BufferPool)

    def __post_init__(self) -> None:
        self.stager = Stager(self.layer, self.mask, self.pool)  # type: ignore[arg-type]
        self.gpu = Device(random.Random(0), has_flags=False)
        self.gpu.python = self.layer.functions

    def stream(self, handle: int = 1) -> EmulatedStream:
        return self.gpu.stream(handle)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_host_only_queues(tokens: int) -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(tokens)
    result = s.stager.submit(stream, *inputs).result(stream)
    assert result.isnan().all() and not s.layer.log
    s.gpu.run()
    assert torch.equal(result, job_of(*inputs))
    assert s.layer.log == [("post", 0), ("wait", 0)]


def test_inputs_are_captured_in_stream_order() -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(3)
    expected = job_of(*inputs)
    job = s.stager.submit(stream, *inputs)
    with stream:
        for tensor in inputs:  # the GPU overwrites them right after
            tensor.zero_()
    result = job.result(stream)
    s.gpu.run()
    assert torch.equal(result, expected)


def test_mask_is_read_in_the_order_of_the_stream() -> None:
    s = Setup()
    stream, (hidden, ids, weights) = s.stream(), batch(3)
    with stream:
        s.mask.fill_(True)
    job = s.stager.submit(stream, hidden, ids, weights)
    result = job.result(stream)
    with stream:
        s.mask.fill_(False)
    s.gpu.run()
    assert not result.any()


def test_host_may_run_ahead_with_other_sizes() -> None:
    s = Setup()
    stream = s.stream()
    batches = [batch(tokens, seed=tokens) for tokens in (3, 4, 3, 1)]
    results = [s.stager.submit(stream, *b).result(stream) for b in batches]
    s.gpu.run()
    for b, result in zip(batches, results, strict=True):
        assert torch.equal(result, job_of(*b))
    assert s.pool.count() == (2, 0)  # capacities 4 and 1


def test_buffers_are_shared_in_one_stream_only_one_after_the_other() -> None:
    s = Setup()
    stream, other = s.stream(1), s.stream(2)
    first, second = (s.stager.submit(stream, *batch(2, seed)) for seed in (1, 2))
    assert first.buffers is not second.buffers
    first.result(stream)
    assert s.stager.submit(other, *batch(2)).buffers is not first.buffers
    assert s.stager.submit(stream, *batch(2)).buffers is first.buffers


def test_layers_that_take_turns_share_their_memory() -> None:
    s = Setup()
    other = FakeLayer(H, E, s.layer.functions)
    second = Stager(other, s.mask, s.pool)  # type: ignore[arg-type]
    stream = s.stream()
    for tokens in (12, 16):
        s.stager.submit(stream, *batch(tokens)).result(stream)
        second.submit(stream, *batch(tokens)).result(stream)
    jobs = [*s.layer.jobs.values(), *other.jobs.values()]
    assert len(jobs) == 4
    assert len({id(job.memory) for job in jobs}) == 1


def test_captured_graph_replays_on_new_inputs() -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(2)
    s.stager.submit(stream, *inputs).result(stream)  # warm-up
    s.gpu.run()
    allocated = len(s.gpu.allocated)
    with s.gpu.capture(stream) as graph:
        result = s.stager.submit(stream, *inputs).result(stream)
    assert len(s.gpu.allocated) == allocated, "allocated under capture after a warm-up"
    for seed in range(3):
        for tensor, new in zip(inputs, batch(2, seed), strict=True):
            tensor.copy_(new)
        graph.launch(stream)
        eager = batch(2, seed + 10)
        between = s.stager.submit(stream, *eager).result(stream)
        s.gpu.run()
        assert torch.equal(result, job_of(*inputs))
        assert torch.equal(between, job_of(*eager))


def test_captured_buffers_are_never_freed_or_used_eagerly() -> None:
    s = Setup()
    stream = s.stream()
    with s.gpu.capture(stream):
        captured = s.stager.submit(stream, *batch(2))
        captured.result(stream)
        second = s.stager.submit(stream, *batch(2))
        assert second.buffers is captured.buffers  # one graph, one stream: one after the other
        second.result(stream)
    other = s.stream(2)
    with s.gpu.capture(other):
        third = s.stager.submit(other, *batch(2))
        assert third.buffers is not captured.buffers  # may be replayed at the same time
        third.result(other)
    eager = s.stager.submit(stream, *batch(2))
    assert eager.buffers not in (captured.buffers, third.buffers)
    eager.result(stream)
    synchronized: list[torch.device] = []
    s.pool.clear(synchronized.append)
    assert synchronized == [DEVICE] and s.pool.count() == (0, 2)
    kept = {captured.buffers, third.buffers}
    assert {key[0] for key in s.stager._captured} == kept and not s.stager._jobs


def test_clear_keeps_what_is_under_way() -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(2)
    job = s.stager.submit(stream, *inputs)
    s.pool.clear(lambda device: None)
    assert len(s.stager._jobs) == 1
    result = job.result(stream)
    s.gpu.run()
    assert torch.equal(result, job_of(*inputs))
    assert s.pool.count() == (1, 0)


def test_buffers_of_a_dropped_job_are_used_again_when_it_has_run() -> None:
    s = Setup()
    stream = s.stream()
    first = s.stager.submit(stream, *batch(2))
    buffers = first.buffers
    del first
    second = s.stager.submit(stream, *batch(2))
    assert second.buffers is not buffers  # the stream has yet to post the first
    second.result(stream)
    s.gpu.run()
    s.pool.clear(lambda device: None)
    assert s.pool.count() == (0, 0) and not s.stager._jobs
    third = s.stager.submit(stream, *batch(2))
    assert third.buffers not in (buffers, second.buffers)


@pytest.mark.parametrize("refused", ["record", "post", "wait", "copy"])
def test_a_stream_that_refuses_leaves_nothing_behind(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(2)
    name = {"record": "record", "copy": "to_device"}.get(refused, "host_function")
    real = getattr(EmulatedStream, name)

    def refuse(self: EmulatedStream, *arguments: Any) -> Any:
        if (self is stream) == (refused != "post"):
            raise RuntimeError("not permitted")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EmulatedStream, name, refuse)
        with pytest.raises(RuntimeError, match="not permitted"):
            s.stager.submit(stream, *inputs).result(stream)
    s.gpu.run()
    allocated = len(s.gpu.allocated)
    result = s.stager.submit(stream, *inputs).result(stream)
    assert len(s.gpu.allocated) == allocated, "the buffers have not come back"
    job = s.layer.jobs[0]
    job.computed = job.posted  # the fake's job runs in the wait, which was refused
    s.gpu.run()
    assert torch.equal(result, job_of(*inputs))


def test_a_job_is_not_discarded_twice() -> None:
    s = Setup()
    job = s.stager.submit(s.stream(), *batch(2))
    for _ in range(2):
        job.discard()
    del job
    assert s.pool.count() == (1, 0)
    s.gpu.run()
    assert s.layer.log == [("post", 0), ("wait", 0)]


def test_a_layer_keeps_the_jobs_that_it_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_JOBS", 3)
    s = Setup()
    stream = s.stream()
    for tokens in (9, 10, 11, 9, 12, 9):  # one capacity
        s.stager.submit(stream, *batch(tokens)).result(stream)
        s.gpu.run()
    assert [tokens for _, tokens, _ in s.stager._jobs] == [11, 12, 9]
    assert len(s.layer.jobs) == 4, "a job in use was made anew"
    with s.gpu.capture(stream):
        for tokens in (9, 10, 11, 12):
            s.stager.submit(stream, *batch(tokens)).result(stream)
    assert len(s.stager._captured) == 4  # graphs replay them


@pytest.mark.parametrize("captured_first", [False, True])
def test_half_captured_call(captured_first: bool) -> None:
    s = Setup()
    first, second = s.stream(1), s.stream(2)
    with s.gpu.capture(first if captured_first else second):
        job = s.stager.submit(first, *batch(2))
        with pytest.raises(
            RuntimeError, match="must either both be captured by a CUDA graph or neither"
        ):
            job.result(second)
        if captured_first:
            job.discard()
    s.gpu.run()


def test_discarding_a_captured_job_later_waits_for_nothing() -> None:
    s = Setup()
    stream = s.stream()
    with s.gpu.capture(stream):
        job = s.stager.submit(stream, *batch(2), join=True)
    job.discard()
    s.gpu.run()
    assert s.pool.count() == (0, 0)  # a replay may still post into its buffers


def test_buffers_of_a_first_capture_and_later_ones_work_together() -> None:
    """Those captured before flags were tried keep their host functions."""
    model = KernelModel(flags=False, count=1)
    graph = model.capture(2)
    model.gpu.has_flags = True
    for seed in range(3):
        model.replay(graph, seed)
        model.step(2, seed + 3)
    later = model.capture(3)
    model.replay(later, 1)
    model.replay(graph, 2)
    model.verify()
