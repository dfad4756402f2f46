"""The CUDA path on the real job slots: compiled host functions, called by a stream without CUDA.

Everything but the driver is real: addresses, post and wait functions, worker threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_moe.staging import BUFFERS
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, E, K, Weights, wrapper
from tests.hybrid_moe.fake_stream import FakeStream
from tests.reference import assert_within

WEIGHTS = Weights.random()


class CompiledStream(FakeStream):
    """Calls host functions by address, as the driver does."""

    def host_function(self, function: int, user_data: int) -> None:
        compiled = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
        self.enqueue(lambda: compiled(user_data))


@pytest.fixture
def stream() -> Iterator[CompiledStream]:
    yield CompiledStream({})
    BUFFERS.clear(lambda device: None)


def on(stream: FakeStream, w: KTMoEWrapper) -> KTMoEWrapper:
    """A wrapper whose calls go to `stream`."""
    runner: Any = w._runner
    runner._stream = lambda device, handle: stream
    return w


def loaded(stream: FakeStream, **arguments: Any) -> KTMoEWrapper:
    # numa_nodes: threads of its own, apart from those of callers that work
    return on(stream, WEIGHTS.load(wrapper(numa_nodes=[0], **arguments)))


@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_stream_and_direct_calls_have_the_same_bits(stream: CompiledStream, tokens: int) -> None:
    batch = Batch.random(tokens)
    direct = WEIGHTS.load(wrapper()).forward(*batch.args)
    w = loaded(stream)
    queued = w.forward(*batch.args, 1)
    stream.run()
    assert torch.equal(direct, queued)


def test_graph_replays_on_new_inputs_and_a_new_mask(stream: CompiledStream) -> None:
    w, given = loaded(stream), Batch.random(2)
    stream.capture = True
    result = w.forward(*given.args, 1)
    stream.capture = False
    for seed in range(3):
        new = Batch.random(2, seed=seed)
        for tensor, values in zip(given.args, new.args, strict=True):
            tensor.copy_(values)
        mask = torch.arange(E) % 3 == seed
        w.gpu_experts_mask = mask
        stream.replay()
        stream.run()
        assert_within(result.double().numpy(), WEIGHTS.expected(new, skip=mask.numpy()))


def test_deferral(stream: CompiledStream) -> None:
    batch = Batch.random(2)
    first = loaded(stream, max_deferred_experts_per_token=1)
    second = loaded(stream, layer_idx=1)
    now = first.forward(*batch.args, 1)
    later = second.forward(batch.hidden, torch.full_like(batch.ids, -1), batch.weights, 1)
    stream.run()
    expected = WEIGHTS.expected(batch)
    error = now.double().numpy() + later.double().numpy() - expected.value
    assert now.any() and later.any()
    assert abs(error / expected.sigma).max() <= 8
    assert first.ignored_ids == 0


def test_ids_out_of_range_are_counted_when_they_are_known(stream: CompiledStream) -> None:
    w, batch = loaded(stream), Batch.random(2)
    batch.ids[0] = -1
    y = w.forward(*batch.args, 1)
    stream.run()
    assert not y[0].any() and y[1].any()
    w.forward(*batch.args, 1)
    assert w.ignored_ids == K


def test_strict_at_a_later_call(stream: CompiledStream) -> None:
    w, batch = loaded(stream, strict=True), Batch.random(2)
    bad = batch.ids.clone()
    bad[0, 0] = E
    w.forward(batch.hidden, bad, batch.weights, 1)
    stream.run()
    with pytest.raises(IndexError, match="1 of the ids"):
        w.forward(*batch.args, 1)


def test_replay_that_needs_an_expert_that_is_nowhere(stream: CompiledStream) -> None:
    w, batch = loaded(stream, num_gpu_experts=1), Batch.random(2)
    batch.ids[0, 0], batch.ids[1] = 0, torch.tensor([2, 3, 4])
    stream.capture = True
    result = w.forward(*batch.args, 1)
    stream.capture = False
    w.gpu_experts_mask[0] = False
    stream.replay()
    stream.run()
    assert result.isnan().all()
    w.gpu_experts_mask[0] = True
    with pytest.raises(RuntimeError, match="tokens are routed to expert 0"):
        w.forward(*batch.args, 1)
