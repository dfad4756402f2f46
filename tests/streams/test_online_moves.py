"""Online placement on emulated streams: what is routed decides what moves, while graphs are
replayed, streams run ahead, and workers are late. Each (token, expert) pair is computed exactly
once, with the right weights, whatever order things happen in."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.placement import swap_loops
from hybrid_moe.placement.online import OnlineOptions, OnlinePlacement
from hybrid_moe.runtime.gpu_arguments import HotOptions
from tests.hybrid_moe.cases import E, K
from tests.hybrid_moe.signatures import signature_batch
from tests.streams import test_moving_experts as moving
from tests.streams.test_moving_experts import HOT, SLOTS, Hybrid, queued

__all__ = ["queued"]  # a fixture of every test here too


class MovedLayer:
    """A layer of `Hybrid` as online placement sees it; its moves go to a stream that is drawn."""

    num_experts, num_experts_per_tok, gpu_slots, slot_nbytes = E, K, SLOTS, 1
    elsewhere = torch.zeros(E, dtype=torch.bool)
    prefill_stream = None

    def __init__(self, model: Hybrid, at: int) -> None:
        self._model, self._runner = model, model.runners[at]
        self.layer_idx = at
        self.gpu_experts_mask = torch.from_numpy(model.placements[at]._mask)
        self.keeps_panels = model.placements[at]._keeps

    @property
    def routed(self) -> npt.NDArray[np.int64]:
        return self._runner._layer.routed

    def promote(self, expert: int, cuda_stream: int | None = None) -> None:
        self._move(expert, True)

    def demote(self, expert: int, cuda_stream: int | None = None) -> None:
        self._move(expert, False)

    def _move(self, expert: int, hot: bool) -> None:
        self._model.on = self._model.rng.choice(self._model.streams)
        self._runner.move(expert, hot, 0)
        self._model.moves += 1


class FollowedModel(Hybrid):
    """`Hybrid`, in which what would move at random looks and follows the traffic instead: before
    and behind each submission, and between a submit and its sync."""

    online: OnlinePlacement | None = None

    def move(self) -> None:
        if self.online is not None:
            self.online.step()

    def pause(self) -> None:
        """The streams catch up now and then, else there would be nothing to follow."""
        self.gpu.run_some(self.rng.choice((0, 5, 100, 10_000)))


class Traffic:
    """Batches whose topic prefers some experts, so that there is something to move."""

    def __init__(self, topics: list[list[int]]) -> None:
        self._topics, self._turn = topics, 0

    def batch(self, tokens: int, seed: int) -> Any:
        """In place of `signature_batch`: most ids are of the topic."""
        made = signature_batch(tokens, seed)
        favourites = torch.tensor(self._topics[self._turn % len(self._topics)])
        rng = torch.Generator().manual_seed(seed)
        if torch.rand(1, generator=rng) < 0.8:
            made.ids[:] = favourites[: made.ids.shape[1]]
        return made

    def next_topic(self) -> None:
        self._turn += 1


@dataclass(frozen=True)
class Course:
    """What happens.

    Attributes:
        steps: ("eager" or "graph", tokens), or ("topic", 0).
        every: steps between looks.
    """

    seed: int
    flags: bool
    deferred: int
    keep: bool
    every: int
    topics: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[str, int], ...]

    def run(self, monkeypatch: pytest.MonkeyPatch) -> tuple[FollowedModel, OnlinePlacement]:
        traffic = Traffic([list(topic) for topic in self.topics])
        monkeypatch.setattr(moving, "signature_batch", traffic.batch)
        options = functools.partial(HotOptions, keep_panels=self.keep)
        monkeypatch.setattr(moving, "HotOptions", options)
        model = FollowedModel(self.seed, flags=self.flags, deferred=self.deferred)
        layers = [MovedLayer(model, at) for at in range(2)]
        online = model.online = OnlinePlacement(
            layers,
            OnlineOptions(
                bytes_per_second=1e9, half_life_pairs=2, payback_pairs=0, keep_panels=self.keep
            ),
            clock=iter(range(1_000_000)).__next__,  # a second a look: none is too early
        )
        model.step(1, 0)
        graphs = {tokens: model.capture(tokens) for tokens in (1, 3)}
        for number, (kind, tokens) in enumerate(self.steps):
            if kind == "topic":
                traffic.next_topic()
            elif kind == "eager":
                model.step(tokens, number)
            else:
                model.replay(graphs[tokens], number)
            if number % self.every == 0:
                online.step()
            model.pause()
        model.verify()
        return model, online


def check(model: Hybrid, online: OnlinePlacement) -> None:
    """Both halves agree where experts are, and the counters have every pair once."""
    report = online.report()
    assert online.active, "no move was refused"
    per_layer = np.zeros((2, E), np.int64)
    for _, values in model.checks:
        for at in range(2):
            ids = values[at].ids
            per_layer[at] += np.bincount(ids[ids >= 0].numpy(), minlength=E)
    for at, (runner, placement) in enumerate(zip(model.runners, model.placements, strict=True)):
        assert np.array_equal(runner._layer.routed, per_layer[at])
        assert sum(runner.pairs) == per_layer[at].sum()
        hot = online._state[at] == online._loops.HOT
        assert placement._mask.tolist() == hot.tolist()
        assert (placement.live == 1).tolist() == hot.tolist()
        assert HOT <= hot.sum() <= SLOTS, "a free slot is filled, and none is emptied for good"
        assert placement._layer.free_places == (0 if placement._keeps else 1 + hot.sum() - HOT)
    online._look()  # at what has come since
    assert online.report().pairs == per_layer.sum()
    assert report.swaps >= report.returns


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """What the compiler of the loops has made stays out of the collections behind each course,
    which take 0.3 s else."""
    swap_loops.prepare()
    gc.freeze()
    yield
    gc.unfreeze()


TOPICS = ((0, 1, 2), (5, 6, 7), (3, 4, 5))
STEPS = (*(("graph", 1),) * 8, ("eager", 2), ("topic", 0), *(("graph", 3),) * 8, ("eager", 1)) * 2


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
def test_experts_follow_the_topic(
    keep: bool, flags: bool, deferred: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under replays of the same graphs, which go by each placement in turn."""
    course = Course(0, flags, deferred, keep, 1, TOPICS, STEPS)
    model, online = course.run(monkeypatch)
    check(model, online)
    assert online.report().swaps >= 4 and model.moves >= 6


@st.composite
def courses(draw: st.DrawFn) -> Course:
    topic = st.permutations(range(E)).map(lambda ids: tuple(ids[:K]))
    step = st.one_of(
        st.tuples(st.just("eager"), st.sampled_from((1, 2, 5))),
        st.tuples(st.just("graph"), st.sampled_from((1, 3))),
        st.just(("topic", 0)),
    )
    return Course(
        seed=draw(st.integers(0, 2**32 - 1)),
        flags=draw(st.booleans()),
        deferred=draw(st.integers(0, 1)),
        keep=draw(st.booleans()),
        every=draw(st.integers(1, 3)),
        topics=tuple(draw(st.lists(topic, min_size=1, max_size=3))),
        steps=tuple(draw(st.lists(step, min_size=1, max_size=12))),
    )


def _run_and_check(course: Course) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(*course.run(patch))
    # what graphs leave behind for good, some MB a course: nobody replays these any more
    gc.collect()
    keeping.release(most=None)
    keeping._replayable.clear()


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=10, deadline=None, suppress_health_check=QUIET)
@given(course=courses())
def test_every_pair_once(course: Course) -> None:
    _run_and_check(course)


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_every_pair_once_in_ten_thousand(part: int) -> None:
    """A thousand courses in each part."""

    @seed(part)
    @settings(max_examples=1000, deadline=None, suppress_health_check=QUIET, database=None)
    @given(course=courses())
    def run(course: Course) -> None:
        _run_and_check(course)

    run()
