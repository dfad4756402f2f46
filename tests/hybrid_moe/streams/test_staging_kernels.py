"""The CUDA path on real graph jobs: compiled hand-over and worker threads, emulated streams."""

from __future__ import annotations

import functools
import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.drivers.records import Mailbox
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.streams.buffers import BufferPool
from hybrid_moe.streams.faults import check_errors
from hybrid_moe.streams.staging import Stager
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.reference import assert_within
from tests.streams.emulation import Device, EmulatedStream

WEIGHTS = Weights.random()


def wait_for_threads() -> bool:
    time.sleep(1e-5)
    return True


@pytest.fixture(params=[True, False], ids=["flags", "host functions"])
def stream(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmulatedStream]:
    monkeypatch.setattr(
        "hybrid_moe.runtime.runner.Stager", functools.partial(Stager, pool=BufferPool())
    )
    gpu = Device(random.Random(0), has_flags=request.param)
    gpu.agents = [(1.0, wait_for_threads)]
    stream = gpu.stream(1)
    with suppress(RuntimeError, IndexError):
        check_errors()  # faults that earlier tests of this process have left
    yield stream
    assert not any(gpu._queues.values()), "jobs that are gone could be posted"


def run(stream: EmulatedStream) -> None:
    """Until the stream has run."""
    while stream.gpu.queue_of(stream.handle) or stream.gpu.queue_of(stream.side.handle):
        stream.gpu.step()


def on(stream: EmulatedStream, w: KTMoEWrapper) -> KTMoEWrapper:
    """A wrapper whose calls go to `stream`."""
    runner: Any = w._runner
    runner._stream = lambda device, handle: stream
    return w


def loaded(stream: EmulatedStream, **arguments: Any) -> KTMoEWrapper:
    # numa_nodes: threads of its own, apart from those of callers that work
    return on(stream, WEIGHTS.load(wrapper(numa_nodes=[0], **arguments)))


@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_stream_and_direct_calls_have_the_same_bits(stream: EmulatedStream, tokens: int) -> None:
    batch = Batch.random(tokens)
    direct = WEIGHTS.load(wrapper()).forward(*batch.args)
    w = loaded(stream)
    queued = w.forward(*batch.args, 1)
    run(stream)
    assert torch.equal(direct, queued)


def test_graph_replays_on_new_inputs_and_a_new_mask(stream: EmulatedStream) -> None:
    w, given = loaded(stream), Batch.random(2)
    with stream.gpu.capture(stream) as graph:
        result = w.forward(*given.args, 1)
    for seed in range(3):
        new = Batch.random(2, seed=seed)
        for tensor, values in zip(given.args, new.args, strict=True):
            tensor.copy_(values)
        mask = torch.arange(E) % 3 == seed
        w.gpu_experts_mask = mask
        graph.launch(stream)
        run(stream)
        assert_within(result.double().numpy(), WEIGHTS.expected(new, skip=mask.numpy()))


def test_deferral(stream: EmulatedStream) -> None:
    batch, chain = Batch.random(2), DeferralChain()
    first = loaded(stream, max_deferred_experts_per_token=1, deferral_chain=chain)
    second = loaded(stream, layer_idx=1, deferral_chain=chain)
    now = first.forward(*batch.args, 1)
    later = second.forward(batch.hidden, torch.full_like(batch.ids, -1), batch.weights, 1)
    run(stream)
    expected = WEIGHTS.expected(batch)
    error = now.double().numpy() + later.double().numpy() - expected.value
    assert now.any() and later.any()
    assert abs(error / expected.sigma).max() <= 8
    assert first.ignored_ids == 0


@pytest.mark.parametrize("resetting", [False, True])
def test_a_step_that_was_given_up(stream: EmulatedStream, resetting: bool) -> None:
    """The stream still runs what was queued; the next step has its own values and no others'."""
    batch, chain = Batch.random(2), DeferralChain()
    layers = [
        loaded(stream, layer_idx=i, max_deferred_experts_per_token=1, deferral_chain=chain)
        for i in range(3)
    ]
    layers[0].forward(*batch.args, 1)
    layers[1].submit_forward(*Batch.random(2, seed=5).args, 1)
    if resetting:
        layers[2].reset()
    else:
        with pytest.raises(RuntimeError, match=r"layer 0 was called before layer 2 .*reset\(\)"):
            layers[0].forward(*batch.args, 1)
    outputs = [w.forward(*batch.args, 1) for w in layers]
    run(stream)
    total = sum(y.double().numpy() for y in outputs)
    expected = WEIGHTS.expected(batch)
    bound = 3 * expected.bound + 2**-8 * sum(abs(y.double().numpy()) for y in outputs)
    assert (abs(total - 3 * expected.value) <= bound).all()


def test_ids_out_of_range_are_counted_when_they_are_known(stream: EmulatedStream) -> None:
    w, batch = loaded(stream), Batch.random(2)
    batch.ids[0] = -1
    y = w.forward(*batch.args, 1)
    run(stream)
    assert not y[0].any() and y[1].any()
    w.forward(*batch.args, 1)
    assert w.ignored_ids == K
    run(stream)


def test_strict_at_a_later_call(stream: EmulatedStream) -> None:
    w, batch = loaded(stream, strict=True), Batch.random(2)
    bad = batch.ids.clone()
    bad[0, 0] = E
    w.forward(batch.hidden, bad, batch.weights, 1)
    run(stream)
    with pytest.raises(IndexError, match="1 of the ids"):
        w.forward(*batch.args, 1)


def test_replay_that_needs_an_expert_that_is_nowhere(stream: EmulatedStream) -> None:
    w, batch = loaded(stream, num_gpu_experts=1), Batch.random(2)
    batch.ids[0, 0], batch.ids[1] = 0, torch.tensor([2, 3, 4])
    with stream.gpu.capture(stream) as graph:
        result = w.forward(*batch.args, 1)
    graph.launch(stream)
    run(stream)
    assert not result.isnan().any()
    check_errors()
    w.gpu_experts_mask[0] = False
    graph.launch(stream)
    run(stream)
    assert result.isnan().all()
    with pytest.raises(RuntimeError, match="layer 0: tokens are routed to expert 0"):
        check_errors()
    check_errors()  # the next batch starts clean
    w.gpu_experts_mask[0] = True
    graph.launch(stream)
    run(stream)
    assert not result.isnan().any()
    check_errors()


def test_errors_of_strict_layers_and_of_several(stream: EmulatedStream) -> None:
    batch = Batch.random(2)
    batch.ids[0, 0] = E
    layers = [loaded(stream, strict=True, layer_idx=index) for index in range(3)]
    lenient = loaded(stream, layer_idx=3)
    for w in (*layers, lenient):
        w.forward(*batch.args, 1)
    run(stream)
    with pytest.raises(IndexError, match=r"layer 0: 1 of the ids .* \(and 2 more layers failed\)"):
        check_errors()
    check_errors()


def test_epoch_of_the_mask_that_a_run_saw(stream: EmulatedStream) -> None:
    w, batch = loaded(stream), Batch.random(2)
    with stream.gpu.capture(stream) as graph:
        w.forward(*batch.args, 1)
    epochs = []
    for change in (None, 1, None, 2, 3):
        if change is not None:
            with stream:  # in the order of the stream, like the GPU's own table of experts
                w.gpu_experts_mask[change] = True
        graph.launch(stream)
        run(stream)
        epochs.append(w.mask_epoch)
    assert epochs == [0, 1, 1, 2, 3]


# What goes, and what stays ------------------------------------------------------------------------


def pinned(stream: EmulatedStream) -> int:
    """Pieces of pinned memory, besides mailboxes, which are few and stay."""
    gc.collect()
    living = [tensor for ref in stream.gpu.allocated if (tensor := ref()) is not None]
    return sum(tensor.shape[-1] != Mailbox.nbytes // 8 for tensor in living)


def soon(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true; threads may still be on their way."""
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            return False
    return True


@pytest.mark.parametrize("cleared", ["before", "between", "under way"])
def test_clear_buffer_cache(
    cleared: str, stream: EmulatedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned memory that nobody uses is freed, and nothing else."""
    pool = BufferPool()
    monkeypatch.setattr("hybrid_moe.runtime.runner.Stager", functools.partial(Stager, pool=pool))
    monkeypatch.setattr("hybrid_moe.runtime.process_wide.BUFFERS", pool)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: run(stream))
    w, batch = loaded(stream), Batch.random(3)
    expected = WEIGHTS.load(wrapper()).forward(*batch.args)
    if cleared == "before":
        KTMoEWrapper.clear_buffer_cache()
    results = [w.forward(*batch.args, 1)]
    if cleared == "between":
        assert pinned(stream) == 4  # x, ids, weights and out
        KTMoEWrapper.clear_buffer_cache()
        assert pinned(stream) == 0
    w.submit_forward(*batch.args, 1)
    if cleared == "under way":
        KTMoEWrapper.clear_buffer_cache()
        assert pinned(stream) == 4  # the second submission's are the first one's
    results.append(w.sync_forward(batch.hidden, 1))
    run(stream)
    assert all(torch.equal(result, expected) for result in results)
    KTMoEWrapper.clear_buffer_cache()
    assert pinned(stream) == 0 and pool.count() == (0, 0)


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_a_wrapper_that_goes_before_its_job_has_run(
    synced: bool, closed: bool, stream: EmulatedStream
) -> None:
    batch = Batch.random(3)
    expected = WEIGHTS.load(wrapper()).forward(*batch.args)
    w = loaded(stream)
    weights = weakref.ref(w._layer._arenas[0])
    w.submit_forward(*batch.args, 1)
    result = w.sync_forward(batch.hidden, 1) if synced else None
    if closed:
        w.close()
    del w
    gc.collect()
    assert weights() is not None  # the stream has yet to post the job
    run(stream)
    assert result is None or torch.equal(result, expected)
    assert soon(lambda: gc.collect() >= 0 and weights() is None)


def test_a_replay_after_its_layer_has_gone(stream: EmulatedStream) -> None:
    batch = Batch.random(2)
    w = loaded(stream)
    layer = weakref.ref(w._layer)
    with stream.gpu.capture(stream) as graph:
        result = w.forward(*batch.args, 1)
    graph.launch(stream)
    run(stream)
    assert not result.isnan().any()
    w.close()
    del w
    assert soon(lambda: gc.collect() >= 0 and layer() is None)
    for _ in range(2):
        with stream:
            result.zero_()
        graph.launch(stream)
        run(stream)
        assert result.isnan().all()
        with pytest.raises(RuntimeError, match="a CUDA graph was replayed after a layer that it"):
            check_errors()
        check_errors()
