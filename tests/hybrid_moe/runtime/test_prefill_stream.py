"""Streamed prefill on CPU tensors: the torch back end, and a link that is a thread."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_moe
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import LayerFormats, layer_formats
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes, SendChoice
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.streams.link import Copies, HostLink
from hybrid_moe.wrapper import KTMoEWrapper
from tests.cpu_kernels.cases import ACTIVATION_ERROR
from tests.hybrid_moe.cases import Batch, E, Weights, wrapper
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures
from tests.hybrid_moe.steps import move
from tests.reference import FIXED_POINT_ERROR, assert_within

SIGNATURES = signature_weights()


class GivenPlanner:
    """Answers what it is given, as far as there is room; then nothing."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers = list(answers)
        self.loads: list[PrefillLoad] = []
        self.times: list[PrefillTimes] = []
        self.carried = 0

    def choose(self, now: PrefillLoad, following: PrefillLoad | None, queued: float) -> SendChoice:
        self.loads.append(now)
        late, ahead = self.answers.pop(0) if self.answers else (0, 0)
        room = 0 if following is None else min(len(following.cold), following.room)
        return SendChoice(min(late, len(now.cold), now.room), min(ahead, room))

    def note(self, times: PrefillTimes) -> None:
        self.times.append(times)

    def note_link(self, nbytes: int, seconds: float) -> None:
        self.carried += nbytes


def layers(
    stream: PrefillStream, count: int = 2, weights: Weights = SIGNATURES, **options: Any
) -> list[KTMoEWrapper]:
    """A model's layers; expert 0 is hot, and there is a slot to spare."""
    made = []
    for index in range(count):
        mask = torch.arange(E) == 0
        w = wrapper(
            layer_idx=3 * index,
            gpu_experts_mask=mask,
            gpu_backend="torch",
            gpu_device="cpu",
            gpu_slots=2,
            prefill_stream=stream,
            **options,
        )
        made.append(weights.load(w))
    return made


def all_free(stream: PrefillStream) -> bool:
    stream.reclaim(())
    return all(slots.free == slots.count for slots in stream._transient.values())


ACTIONS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(2, 9), st.integers(0, E), st.integers(0, E)),
    st.tuples(st.just("decode"), st.just(1), st.just(0), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 1), st.integers(0, E - 1), st.just(0)),
    st.tuples(st.just("skip"), st.integers(2, 5), st.integers(0, E), st.integers(0, E)),
)


@pytest.mark.parametrize("deferred", [0, 1])
def test_every_pair_runs_once(deferred: int) -> None:
    """Long batches, single tokens, experts that move, a layer that is left out, in any order."""
    planner = GivenPlanner()
    stream = PrefillStream(planner, slots=5, tokens=2)
    chain = DeferralChain()
    model = layers(stream, deferral_chain=chain, max_deferred_experts_per_token=deferred)
    seeds = iter(range(1 << 30))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(ACTIONS, min_size=1, max_size=12))
    def run(actions: list[tuple[str, int, int, int]]) -> None:
        for what, number, late, ahead in actions:
            if what == "move":
                move(model[number], late)
                continue
            used = model[-1:] if what == "skip" else model
            planner.answers = [(late, ahead), (ahead, late)]
            batches = [signature_batch(number, next(seeds)) for _ in used]
            outputs = [w.forward(*b.args) for w, b in zip(used, batches, strict=True)]
            expected = [signatures(b) for b in batches]
            assert torch.equal(sum(outputs), sum(expected))  # type: ignore[arg-type]
            assert deferred or all(map(torch.equal, outputs, expected))

    run()
    assert all_free(stream)
    stream.learn()
    assert planner.times and planner.carried == stream.sent_bytes > 0
    for w in model:
        w.close()


def test_panels_that_are_kept() -> None:
    """An expert in a slot is on the CPU too: it is neither sent nor computed twice."""
    planner = GivenPlanner((E, 0), (E, 0))
    stream = PrefillStream(planner, slots=E, tokens=2)
    (w,) = layers(stream, 1, gpu_panels="keep")
    for seed in range(2):
        batch = signature_batch(9, seed)
        assert torch.equal(w.forward(*batch.args), signatures(batch))
        assert planner.loads[-1].on_gpu.experts == 1 + seed
        if seed == 0:
            w.promote(3)


def test_prompts_of_several_threads() -> None:
    """Two threads, each in a layer of its own at times, share slots and link."""
    planner = GivenPlanner(*((seed % 4, seed % 3) for seed in range(400)))
    stream = PrefillStream(planner, slots=5, tokens=2)
    model = layers(stream)
    wrong: list[str] = []

    def work(w: KTMoEWrapper, first: int) -> None:
        for seed in range(first, first + 40):
            batch = signature_batch(6, seed)
            if not torch.equal(w.forward(*batch.args), signatures(batch)):
                wrong.append(f"layer {w.layer_idx}, batch {seed}")

    threads = [threading.Thread(target=work, args=(w, 1000 * at)) for at, w in enumerate(model)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(planner.loads) == 80


OTHERS = (FORMATS["MXFP4"], FORMATS["BF16"], FORMATS["INT4_G32_BF16"])


@pytest.mark.parametrize("pools", range(1, min(2, usable_cores()) + 1))
@pytest.mark.parametrize(
    "formats",
    [*OTHERS, LayerFormats(FORMATS["INT4_ROW_FLOAT32"], FORMATS["INT8"])],
    ids=lambda f: layer_formats(f).gate_up.name,
)
def test_result(formats: Any, pools: int) -> None:
    """Within the contract's bound, biases and all, where all that is cold is sent."""
    held = layer_formats(formats)
    error = max(ACTIVATION_ERROR.get(f.name, FIXED_POINT_ERROR) for f in held)
    stream = PrefillStream(GivenPlanner((E, 0), (E, 0)), slots=E, tokens=2)
    weights = Weights.random(bias=True)
    pooled = {"cpuinfer_threads": pools, "threadpool_count": pools}
    (w,) = layers(stream, 1, weights, formats=held, **pooled)
    batch, before = Batch.random(40), hybrid_moe.metrics()
    out = w.forward(*batch.args)
    expected = weights.expected(batch, held, activation_error=error)
    assert_within(out.double().numpy(), expected)
    nbytes = sum(w._layer.expert_nbytes(pool) for pool in range(pools))
    assert stream.sent_bytes == (E - 1) * nbytes
    assert (hybrid_moe.metrics() - before).sent_bytes == stream.sent_bytes
    assert stream.nbytes == E * nbytes
    assert w.pairs == (int((batch.ids >= 0).sum()), 0)


def test_the_planner_sees_what_waits() -> None:
    """Pairs of cold experts that nobody has sent, most first, and the room that is left."""
    planner = GivenPlanner((0, 2), (1, 0))
    stream = PrefillStream(planner, slots=6, tokens=2)
    model = layers(stream)
    ids = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 1, -1], [2, 5, E]])
    hidden, weights = torch.zeros(4, 64, dtype=torch.bfloat16), torch.ones(4, 3)
    hidden[:, 0] = 1
    for w in model:
        w.forward(hidden, ids, weights)
    first, second = planner.loads
    assert first.cold.tolist() == [4, 3, 1, 1] and first.on_gpu == (1, 1)
    assert first.room == 6 and first.layer == 0 and first.nbytes == model[0]._layer.expert_nbytes(0)
    # nothing was known of the second layer: experts 1 and 2 came ahead, the first ids
    assert second.cold.tolist() == [1, 1] and second.on_gpu == (3, 8)
    assert second.room == 4 and second.layer == 3
    assert stream.sent_bytes == 3 * first.nbytes and stream.unused_bytes == 0
    stream.learn()
    assert [t.sent for t in planner.times] == [0, 1]
    assert planner.times[0].before is None and planner.times[1].before is not None


class HeldLink(HostLink):
    """Copies when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def carry(self, copies: Copies) -> None:
        assert self.go.wait(60)
        super().carry(copies)


def test_an_expert_that_moves_while_it_travels() -> None:
    """Promoted, its place given to another, and demoted again before its copy was made: the copy is
    of another expert's bytes, and is not used."""
    planner, link = GivenPlanner((0, 2)), HeldLink()
    stream = PrefillStream(planner, slots=6, tokens=2, link=link)
    first, second = layers(stream)
    first.forward(*signature_batch(4, 0).args)  # sends experts 1 and 2 of the second layer
    second.promote(1)
    second.demote(0)  # into the place that 1 had
    second.demote(1)
    link.go.set()
    batch = signature_batch(6, 1)
    assert torch.equal(second.forward(*batch.args), signatures(batch))
    assert planner.loads[-1].on_gpu.experts <= 1


class BrokenLink(HostLink):
    def carry(self, copies: Copies) -> None:
        raise OSError("the cable is out")


def test_copies_that_fail() -> None:
    """The step fails with their reason; slots come back, and what needs no copies still works."""
    stream = PrefillStream(GivenPlanner((2, 0)), slots=4, tokens=2, link=BrokenLink())
    (w,) = layers(stream, 1)
    batch = signature_batch(4, 0)
    with pytest.raises(RuntimeError, match="could not be copied: the cable is out"):
        w.forward(*batch.args)
    assert torch.equal(w.forward(*batch.args), signatures(batch))
    assert all_free(stream)


def test_layers_that_are_dropped_give_back_their_slots() -> None:
    stream = PrefillStream(GivenPlanner((0, 3)), slots=6, tokens=2)
    model = layers(stream)
    model[0].forward(*signature_batch(4, 0).args)
    slots = next(iter(stream._transient.values()))
    assert slots.free == 3
    model.clear()
    gc.collect()
    assert slots.free == 6


def test_refusals() -> None:
    planner = GivenPlanner()
    with pytest.raises(ValueError, match="slots is 1, must be at least 2"):
        PrefillStream(planner, 1)
    with pytest.raises(ValueError, match="tokens is 0"):
        PrefillStream(planner, 2, tokens=0)
    with pytest.raises(ValueError, match="prefill_stream needs a gpu_backend"):
        wrapper(prefill_stream=PrefillStream(planner, 2))
    with pytest.raises(TypeError, match="prefill_stream must be"):
        wrapper(gpu_backend="torch", gpu_device="cpu", prefill_stream="yes")
    stream = PrefillStream(planner, 4)
    (w,) = layers(stream, 1)
    with pytest.raises(ValueError, match="has a layer 0 already"):
        layers(stream, 1)
    w.close()
    (again,) = layers(stream, 1)
    assert again.loaded
