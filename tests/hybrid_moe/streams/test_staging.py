"""Order on a stream: capture of inputs, reuse of buffers, graphs, and reports of workers."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.streams.slots import SlotReport
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.runner import LayerRunner
from hybrid_moe.streams import cuda, flags, staging
from hybrid_moe.streams.buffers import BufferPool
from hybrid_moe.streams.staging import Stager
from tests.hybrid_moe.members import Layer
from tests.hybrid_moe.streams.fake_slots import FakeMaker, job_of
from tests.streams.emulation import DEVICE, Device, EmulatedStream
from tests.streams.model import Model as KernelModel

E, K, H = 6, 2, 32


def batch(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, H, generator=rng).to(torch.bfloat16),
        torch.randint(0, E, (tokens, K), generator=rng, dtype=torch.int32),
        torch.randint(1, 8, (tokens, K), generator=rng).to(torch.bfloat16) / 8,
    )


@dataclass
class Setup:
    maker: FakeMaker = field(default_factory=lambda: FakeMaker(H, E))
    mask: torch.Tensor = field(default_factory=lambda: torch.zeros(E, dtype=torch.bool))
    pool: BufferPool = field(default_factory=BufferPool)

    def __post_init__(self) -> None:
        self.stager = Stager(self.maker, self.mask, self.pool)
        self.gpu = Device(random.Random(0), has_flags=False)
        self.gpu.python = self.maker.functions

    def stream(self, handle: int = 1) -> EmulatedStream:
        return self.gpu.stream(handle)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_host_only_queues(tokens: int) -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(tokens)
    result = s.stager.submit(stream, *inputs).result(stream)
    assert result.isnan().all() and not s.maker.log
    s.gpu.run()
    assert torch.equal(result, job_of(*inputs))
    assert s.maker.log == [("post", 0), ("wait", 0)]


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


def test_layers_that_take_turns_share_their_scratch() -> None:
    s = Setup()
    other = FakeMaker(H, E, s.maker.functions)
    second = Stager(other, s.mask, s.pool)
    stream = s.stream()
    for tokens in (12, 16):
        s.stager.submit(stream, *batch(tokens)).result(stream)
        second.submit(stream, *batch(tokens)).result(stream)
    slots = [*s.maker.slots.values(), *other.slots.values()]
    assert len(slots) == 4
    assert len({id(slot.arguments["scratch"]) for slot in slots}) == 1


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
    assert {key[0] for key in s.stager._captured} == kept and not s.stager._slots


def test_clear_keeps_what_is_under_way() -> None:
    s = Setup()
    stream, inputs = s.stream(), batch(2)
    job = s.stager.submit(stream, *inputs)
    s.pool.clear(lambda device: None)
    assert len(s.stager._slots) == 1
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
    assert s.pool.count() == (0, 0) and not s.stager._slots
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
    slot = s.maker.slots[0]
    slot.computed = slot.posted  # the fake's job runs in the wait, which was refused
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
    assert s.maker.log == [("post", 0), ("wait", 0)]


def test_a_layer_keeps_the_slots_that_it_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_SLOTS", 3)
    s = Setup()
    stream = s.stream()
    for tokens in (9, 10, 11, 9, 12, 9):  # one capacity
        s.stager.submit(stream, *batch(tokens)).result(stream)
        s.gpu.run()
    assert [tokens for _, tokens, _ in s.stager._slots] == [11, 12, 9]
    assert len(s.maker.slots) == 4, "a slot in use was made anew"
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


# The runner on streams ------------------------------------------------------------------------


@dataclass
class Model:
    """Runners of consecutive layers on one fake stream."""

    deferred: int = 0
    strict: bool = False
    layers: int = 1
    resident: torch.Tensor = field(default_factory=lambda: torch.ones(E, dtype=torch.bool))

    def __post_init__(self) -> None:
        self.makers = [FakeMaker(H, E) for _ in range(self.layers)]
        self.gpu = Device(random.Random(0), has_flags=False)
        self.gpu.python = {k: v for m in self.makers for k, v in m.functions.items()}
        self.stream = self.gpu.stream()
        self.mask = torch.zeros(E, dtype=torch.bool)
        shapes = [LayerShape(i, E, K, H, 32) for i in range(self.layers)]
        self.members: list[Layer] = []
        chain = DeferralChain()
        self.runners = []
        for shape, maker in zip(shapes, self.makers, strict=True):
            self.members.append(Layer(shape.layer_idx, hidden_size=H))
            chain.join(self.members[-1])
            runner: Any = LayerRunner(
                maker,  # type: ignore[arg-type]
                shape,
                self.mask,
                self.resident.numpy(),
                chain,
                deferred=self.deferred,
                strict=self.strict,
            )
            runner._stream = lambda device, handle: self.stream
            runner._small_calls = set()  # for tensors on the CPU
            runner._stager = Stager(maker, self.mask, BufferPool())
            self.runners.append(runner)

    def forward(self, layer: int, inputs: Any) -> torch.Tensor:
        self.runners[layer].submit(*inputs, 1)
        result: torch.Tensor = self.runners[layer].sync(inputs[0], 1)
        return result


def test_runner_defers_across_layers_on_a_stream() -> None:
    model = Model(deferred=1, layers=2)
    hidden = torch.ones(1, H, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[1, 3]]), torch.tensor([[0.75, 0.25]])
    first = model.forward(0, (hidden, ids, weights))
    second = model.forward(1, (hidden, torch.tensor([[-1, -1]]), weights))
    assert first.isnan().all() and second.isnan().all()
    model.gpu.run()
    assert set(first.flatten().tolist()) == {0.75 * 2}
    assert set(second.flatten().tolist()) == {0.25 * 4}
    assert not model.gpu.entered


def test_runner_raises_what_workers_report() -> None:
    model = Model()
    model.forward(0, batch(2))
    for report, message in (
        (SlotReport(0, 0, -1, "worker 3 died"), "layer 0: worker 3 died"),
        (SlotReport(0, 2, 4, None), "routed to expert 4"),
    ):
        model.makers[0].report = report
        with pytest.raises(RuntimeError, match=message):
            model.forward(0, batch(2))
    model.makers[0].report = SlotReport(5, 0, -1, None)
    model.forward(0, batch(2))
    assert model.runners[0].ignored_ids == 5


def test_runner_is_strict_at_a_later_call() -> None:
    model = Model(strict=True)
    model.forward(0, batch(2))
    model.makers[0].report = SlotReport(5, 0, -1, None)
    with pytest.raises(IndexError, match="5 of the ids"):
        model.forward(0, batch(2))


def test_runner_refuses_what_it_could_not_check() -> None:
    model = Model(deferred=1, strict=True, layers=2)
    with pytest.raises(ValueError, match="strict=True cannot tell"):
        model.forward(0, batch(2))
    model = Model(resident=torch.arange(E) != 2)
    with pytest.raises(RuntimeError, match="expert 2, which gpu_experts_mask no longer"):
        model.forward(0, batch(2))


# The CUDA runtime -----------------------------------------------------------------------------


def test_library_is_found_among_the_loaded_ones() -> None:
    libc = cuda.loaded_library("libc.so")
    assert libc.getpid() > 0
    with pytest.raises(RuntimeError, match="no libdoes_not_exist is loaded"):
        cuda.loaded_library("libdoes_not_exist")


class FakeRuntime:
    """Remembers calls; `code` is what they return."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.launched: list[tuple[int, int, int]] = []
        self.mode = 0  # of this thread: global

    def cudaLaunchHostFunc(self, stream: int, function: int, user_data: int) -> int:  # noqa: N802
        self.launched.append((stream, function, user_data))
        return self.code

    def cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return b"operation not permitted when stream is capturing"

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        box = mode._obj
        self.mode, box.value = box.value, self.mode
        return 0


def cuda_stream(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> cuda.CudaStream:
    monkeypatch.setattr(cuda, "runtime", lambda: runtime)
    stream = object.__new__(cuda.CudaStream)  # without the device that its constructor asks for
    stream.handle, stream.device = 77, torch.device("cuda:0")
    return stream


def test_host_function_is_launched_on_the_given_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    cuda_stream(monkeypatch, runtime).host_function(1234, 5678)
    assert runtime.launched == [(77, 1234, 5678)]


def test_refused_host_function_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cuda_stream(monkeypatch, FakeRuntime(900))
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing \(error 900"):
        stream.host_function(1, 2)


def test_pinned_memory_is_allocated_in_relaxed_capture_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime()
    stream = cuda_stream(monkeypatch, runtime)
    modes = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        assert kwargs["pin_memory"]
        modes.append(runtime.mode)
        raise RuntimeError("no pinned memory left")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(RuntimeError, match="no pinned memory left"):
        stream.pinned((2, 3), torch.int64)
    assert modes == [2] and runtime.mode == 0


class FakeDriver:
    """Remembers stream memory operations; `code` is what they return."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[object, ...]] = []

    def cuMemHostGetDevicePointer_v2(self, box: Any, host: int, flags: int) -> int:  # noqa: N802
        box._obj.value = host + 0x10000
        return 0

    def cuStreamWriteValue64_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("write", *arguments))
        return self.code

    def cuStreamWaitValue64_v2(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("wait", *arguments))
        return self.code

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_NOT_SUPPORTED"
        return 0


def test_flags_go_to_the_device_address(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, stream = FakeDriver(), cuda_stream(monkeypatch, FakeRuntime())
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    cuda.device_address.cache_clear()
    stream.write_value(0x40, 9)
    stream.wait_value(0x48, 1)
    assert driver.calls == [("write", 77, 0x10040, 9, 0), ("wait", 77, 0x10048, 1, 1)]
    driver.code = 801
    with pytest.raises(RuntimeError, match=r"WriteValue64 failed: CUDA_ERROR_NOT_SUPPORTED \(err"):
        stream.write_value(0x40, 9)
    cuda.device_address.cache_clear()


# Whether memory flags work ----------------------------------------------------------------------


@dataclass
class Trial:
    """Two words, and a stream that answers as `reaction` says at each query."""

    posted: int = 7
    waits: bool = True
    hears: bool = True
    clears: bool = True
    words: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    starts: int = 0
    ends: int = 0

    def start(self) -> None:
        assert self.words[0] == 0, "what an earlier exchange left would be taken for an answer"
        self.starts += 1
        self.words[0] = self.posted

    def record(self) -> Any:
        return self

    def query(self) -> bool:
        answered = bool(self.words[1])
        over = (answered and self.hears) if self.waits else True
        if answered and over and self.clears:
            self.words[1] = 0
            self.ends += 1
        return over


def test_trial_of_flags() -> None:
    trial = Trial()
    for turn in range(1, 4):
        flags.exchange(trial.words, trial.start, trial.record)
        assert trial.starts == turn and trial.ends == turn
        assert trial.words.tolist() == [7, 0]  # posted and seen, answered and cleared


@pytest.mark.parametrize(
    "defect,message",
    [
        ({"posted": 0}, "the host does not see"),
        ({"waits": False}, "did not wait"),
        ({"hears": False}, "does not see what the host writes"),
        ({"clears": False}, "did not clear"),
    ],
)
def test_trial_finds(defect: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_PATIENCE_S", 0.01)
    trial = Trial(**defect)
    with pytest.raises(flags.TrialError, match=message):
        flags.exchange(trial.words, trial.start, trial.record)


def test_flags_are_tried_once_and_not_under_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, tried = torch.device("cuda", 3), []

    def refuse(device: torch.device) -> None:
        tried.append(device)
        raise flags.TrialError("no 64-bit operations")

    monkeypatch.setattr(flags, "_tried", {})
    monkeypatch.setattr(flags, "_untried", {3})
    monkeypatch.setattr(flags, "try_flags", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    assert not flags.flags_work(gpu, may_try=False) and not tried
    assert not flags.flags_work(gpu, may_try=True)
    assert not flags.flags_work(gpu, may_try=True)
    assert tried == [gpu]
    (record,) = [r for r in caplog.records if r.name == "hybrid_moe.streams.flags"]
    assert record.getMessage() == (
        "GPU 3: jobs are handed over by host functions, since memory flags do not work: no 64-bit "
        "operations"
    )


def test_flags_are_tried_after_a_capture_that_came_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, tried = torch.device("cuda", 3), []
    monkeypatch.setattr(flags, "_tried", {})
    monkeypatch.setattr(flags, "_untried", set())
    monkeypatch.setattr(flags, "try_flags", tried.append)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    for _ in range(3):
        assert not flags.flags_work(gpu, may_try=False)
    (record,) = [r for r in caplog.records if r.name == "hybrid_moe.streams.flags"]
    assert record.getMessage() == (
        "GPU 3: its first use is in a capture, where memory flags cannot be tried: this graph's "
        "jobs are handed over by host functions; run the layers once before the capture for flags"
    )
    assert not tried
    assert flags.flags_work(gpu, may_try=True) and tried == [gpu]
    assert flags.flags_work(gpu, may_try=False)  # in later captures as well


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


def test_host_functions_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_tried", {0: True})
    assert flags.flags_work(torch.device("cuda", 0), may_try=True)
    monkeypatch.setenv(flags.HANDOVER, "host")
    assert not flags.flags_work(torch.device("cuda", 0), may_try=True)
