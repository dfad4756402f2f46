"""Experts travel to an emulated GPU for one batch, while others compute, in any order that the
streams leave open. Experts are their signatures: a slot that is overwritten too early, an expert
that both halves compute, or one that neither does, gives another sum."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes, SendChoice
from hybrid_moe.runtime.prefill_stream import PrefillStream, Swap
from hybrid_moe.runtime.step_choices import BatchPlanner
from hybrid_moe.streams.link import StreamLink
from tests.hybrid_moe.cases import E
from tests.hybrid_moe.signatures import signature_batch
from tests.hybrid_moe.steps import SLOW_CPU, AnySteps, sure
from tests.streams.emulation import Device
from tests.streams.test_moving_experts import SEEDS, Hybrid, check_a_place_is_kept, queued

__all__ = ["queued"]  # a fixture


FULL_SEEDS = [pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 40)]


class AnyPlanner:
    """Chooses at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sent = self.noted = self.carried = self.timed = 0

    def choose(self, now: PrefillLoad, following: PrefillLoad | None, queued: float) -> SendChoice:
        assert (np.diff(now.cold) <= 0).all() and (now.cold > 0).all()
        late = self.rng.randint(0, min(len(now.cold), now.room))
        ahead = 0
        if following is not None:
            ahead = self.rng.randint(0, min(len(following.cold), following.room))
        self.sent += late + ahead
        return SendChoice(late, ahead)

    def note(self, times: PrefillTimes) -> None:
        assert times.cpu is None or times.cpu >= 0
        self.timed += times.cpu is not None
        self.noted += 1

    def note_link(self, nbytes: int, seconds: float) -> None:
        assert seconds >= 0
        self.carried += nbytes


def streamed(
    seed: int, flags: bool, deferred: int = 0, slots: int = 5, steps: BatchPlanner | None = None
) -> Hybrid:
    """Batches of two tokens and more are streamed; with `steps`, of five."""
    planner = AnyPlanner(random.Random(seed))

    def prefill(gpu: Device) -> PrefillStream:
        tokens, link = 2 if steps is None else 5, StreamLink(gpu.stream())
        return PrefillStream(planner, slots, tokens, link, steps=steps)

    model = Hybrid(seed, flags=flags, deferred=deferred, prefill=prefill)
    for runner in model.runners:
        assert runner._streamed is not None
    return model


def owner(model: Hybrid) -> PrefillStream:
    layer = model.runners[0]._streamed
    assert layer is not None
    return layer._owner


def in_any_order(model: Hybrid, graph: Any, steps: int, share: float, sizes: Sequence[int]) -> None:
    """Batches of these sizes, a share of all, replays of a graph, and moves between them."""
    rng = model.rng
    for step in range(1, steps):
        if rng.random() < share:
            model.step(rng.choice(sizes), step)
        else:
            model.replay(graph, step)
        for _ in range(rng.randrange(3)):
            model.move()
        model.pause()
    model.verify()


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_order(seed: int, flags: bool, deferred: int) -> None:
    """Long batches, decode steps, replays of a graph, and experts that move between all of them."""
    model = streamed(seed, flags, deferred)
    model.step(3, 0)
    in_any_order(model, model.capture(1), 8, 0.7, (1, 2, 5, 9))
    stream = owner(model)
    stream.learn()
    planner = stream.planner
    assert isinstance(planner, AnyPlanner)
    assert planner.sent > 0 and planner.noted > 0 and planner.timed > 0
    assert planner.carried == stream.sent_bytes > 0
    stream.reclaim(())
    for slots in stream._transient.values():
        assert slots.free == slots.count


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@pytest.mark.parametrize("seed", [*SEEDS[:1], *FULL_SEEDS])
def test_short_batches_in_any_order(seed: int, flags: bool, deferred: int) -> None:
    """Steps that are decided and steps that are not, prompts, and replays of a graph."""
    steps = AnySteps(random.Random(seed))
    model = streamed(seed, flags, deferred, steps=steps)
    model.step(3, 0)
    before = owner(model).sent_bytes
    graph = model.capture(1)
    assert owner(model).sent_bytes == before, "nobody waits for the routing under capture"
    in_any_order(model, graph, 9, 0.8, (1, 2, 4, 9))
    stream = owner(model)
    stream.learn()
    assert steps.sent > 0 and steps.noted > 0 and steps.carried == stream.sent_bytes > 0
    stream.reclaim(())
    assert all(slots.free == slots.count for slots in stream._transient.values())


def test_a_slow_cpu_sends() -> None:
    """The scheduler's own decisions, by rates of a CPU as slow as the link: half of what is cold,
    at most, is sent, and the sums are right."""
    model = streamed(7, flags=True, steps=sure(SLOW_CPU))
    for step in range(6):
        model.step(1, step)
    model.verify()
    (nbytes,) = {runner._layer.expert_nbytes(0) for runner in model.runners}
    cold = sum(pairs for _, pairs in (runner.pairs for runner in model.runners))
    assert 0 < owner(model).sent_bytes // nbytes <= cold


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_experts_that_stay(flags: bool) -> None:
    """Those that are to be sent change places with hot ones before the batch begins, behind the
    jobs and the moves that are under way."""
    steps = AnySteps(random.Random(1))
    model = streamed(6, flags, steps=steps)
    chance = StaysByChance(model)
    owner(model).let_stay(chance.stay)
    for step in range(12):
        model.step(1 + step % 4, step)
        model.move()
        model.pause()
    model.verify()
    assert chance.came > 5


class StaysByChance:
    """Lets experts stay by chance, each in the place of any hot one."""

    def __init__(self, model: Hybrid) -> None:
        self.model, self.came = model, 0

    def stay(self, layer: int, sent: tuple[int, ...], swap: Swap) -> tuple[int, ...]:
        placement = self.model.placements[[m.layer_idx for m in self.model.members].index(layer)]
        stay = []
        for up in sent:
            hot = np.flatnonzero(placement.hot).tolist()
            if hot and placement._layer.free_places and self.model.rng.random() < 0.5:
                swap(self.model.rng.choice(hot), up)
                stay.append(up)
        self.came += len(stay)
        return tuple(stay)


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_a_streamed_submission_that_is_dropped(flags: bool) -> None:
    """Its slots and its buffers come back, and what follows is right."""
    model = streamed(3, flags)
    model.dropped, runner = True, model.runners[0]
    for seed in range(4):
        runner.submit(*signature_batch(4, seed).args, 0)
        runner.drop()
        model.pause()
    model.gpu.run()
    model.step(4, 9)
    model.verify()
    stream = owner(model)
    stream.reclaim(())
    assert all(slots.free == slots.count for slots in stream._transient.values())


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_a_place_is_not_overwritten_under_a_streamed_job(flags: bool) -> None:
    """The workers begin when the stream cannot get further without them: a job has expert 7 in the
    place into which expert 0 is copied behind it."""
    model = streamed(0, flags)
    owner(model).planner.choose = lambda now, following, queued: SendChoice(0)  # type: ignore[method-assign]
    check_a_place_is_kept(model)


def test_no_streaming_under_capture() -> None:
    """Nobody may wait for the routing there: the graph has the CPU's experts as ever."""
    model = streamed(4, flags=True)
    model.step(4, 0)
    before = owner(model).sent_bytes
    graph = model.capture(4)
    assert owner(model).sent_bytes == before
    model.replay(graph, 1)
    model.step(4, 2)
    model.verify()


def test_experts_that_no_token_takes_stay() -> None:
    """All of them are cold; ids name three."""
    model = streamed(5, flags=True, slots=E)
    stream = owner(model)
    planner = stream.planner
    assert isinstance(planner, AnyPlanner)
    planner.choose = lambda now, following, queued: SendChoice(min(len(now.cold), now.room))  # type: ignore[method-assign]
    given = torch.zeros(4, 64, dtype=torch.bfloat16)
    given[:, 0] = 1
    ids = torch.tensor([[3, 4, -1]] * 3 + [[7, 4, E + 3]])
    model.runners[0].submit(given, ids, torch.ones(4, 3), 0)
    out = model.runners[0].sync(given, 0)
    model.gpu.run()
    layer = model.runners[0]._layer
    assert stream.sent_bytes == 3 * layer.expert_nbytes(0)
    expected = torch.zeros(4, E)
    expected[:3, 3] = expected[:, 4] = expected[3, 7] = 1
    assert torch.equal(out, expected.repeat(1, 64 // E).to(torch.bfloat16))
