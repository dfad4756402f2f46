"""Layers that go while their jobs are on the way: nothing is used after it is freed, and all of it
is freed in the end.

Ten thousand drops: python -m pytest tests/streams/test_drops.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.graph_job import GraphJob
from hybrid_moe.cpu_kernels.streams.progress import Progress
from hybrid_moe.streams.buffers import BufferPool, Buffers
from hybrid_moe.streams.staging import StreamJob
from tests.streams.drops import HOWS, Drop
from tests.streams.model import Inputs, Model
from tests.streams.watched_memory import UseAfterFreeError

_ENOUGH = 200
"""No submission of one layer takes so many steps."""

WAYS = pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])


@WAYS
@pytest.mark.parametrize("replays", [0, 1], ids=["eager", "replayed"])
def test_layers_go_at_every_point(flags: bool, replays: int) -> None:
    points = next(n for n in range(_ENOUGH) if not Drop(0, flags, "drop", n, replays=replays).run())
    assert points > 8  # copies, post, launch, job, answer


@settings(max_examples=settings.default.max_examples // 4)
@given(
    drop=st.builds(
        Drop,
        seed=st.integers(0, 2**32 - 1),
        flags=st.booleans(),
        how=st.sampled_from(HOWS),
        steps=st.integers(0, 60),
        deferred=st.integers(0, 1),
        count=st.integers(1, 3),
        replays=st.just(0),
        haste=st.tuples(*[st.sampled_from([0.02, 1.0, 30.0])] * 2),
        channels=st.sampled_from([None, 1, 2]),
    )
)
def test_any_submission(drop: Drop) -> None:
    drop.run()


@settings(max_examples=settings.default.max_examples // 10)
@given(
    drop=st.builds(
        Drop,
        seed=st.integers(0, 2**32 - 1),
        flags=st.booleans(),
        how=st.sampled_from(["drop", "close", "close layer"]),
        steps=st.integers(0, 120),
        deferred=st.integers(0, 1),
        count=st.integers(1, 3),
        replays=st.integers(1, 3),
        haste=st.tuples(*[st.sampled_from([0.02, 1.0, 30.0])] * 2),
        channels=st.sampled_from([None, 1, 2]),
    )
)
def test_any_replay(drop: Drop) -> None:
    drop.run()


# What keeps memory, left out one by one ---------------------------------------------------------


def found(drops: list[Drop]) -> set[str]:
    """The kinds of failures among `drops`, as names of exceptions."""
    kinds = set()
    for drop in drops:
        try:
            drop.run()
        except AssertionError as failure:
            kinds.add(type(failure).__name__)
    return kinds


def points(*, replays: int = 0, how: str = "drop") -> list[Drop]:
    """Drops at several points of one submission, in both ways."""
    return [
        Drop(0, flags, how, steps, replays=replays)
        for flags, steps in itertools.product((True, False), range(0, 24 if not replays else 48, 3))
    ]


USED = UseAfterFreeError.__name__


def replace_init(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    real = GraphJob.__init__

    def init(self: GraphJob, *args: Any, **kwargs: Any) -> None:
        change(kwargs)
        real(self, *args, **kwargs)

    monkeypatch.setattr(GraphJob, "__init__", init)


def test_jobs_that_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "until_idle", lambda progress, memory: None)
    assert USED in found(points())


def test_jobs_that_do_not_keep_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only jobs that were given up, and posts to come, keep memory."""

    def idle(self: Progress) -> bool:
        posted = self._record.visits.value >= self.queued
        return posted and self._record.abandoned.value <= self._group.completed

    monkeypatch.setattr(Progress, "idle", property(idle))
    assert USED in found(points())


def test_jobs_that_do_not_count_posts_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphJob, "will_visit", lambda self, captured, number=1: None)
    assert USED in found(points())


@pytest.mark.parametrize("part", ["owned", "buffers"])
def test_jobs_that_keep_a_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_init(monkeypatch, lambda kwargs: kwargs.update({part: None}))
    assert USED in found(points())


def test_jobs_that_do_not_keep_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_mask(kwargs: dict[str, Any]) -> None:
        kwargs["buffers"] = kwargs["buffers"][0]

    replace_init(monkeypatch, drop_mask)
    assert USED in found(points())


def test_graphs_whose_jobs_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "for_good", lambda memory: None)
    assert USED in found(points(replays=1))


def test_graphs_that_still_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs stay, and lead to a layer that is gone."""
    monkeypatch.setattr(Progress, "close", lambda self: None)
    assert USED in found(points(replays=1))


def test_jobs_that_nobody_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their buffers are used again while they run."""

    def give_back(self: BufferPool, buffers: Buffers, progress: object, stream: Any) -> None:
        self.give_back(buffers, stream)

    monkeypatch.setattr(BufferPool, "lost", give_back)
    with pytest.raises(AssertionError):
        uncollected_jobs(flags=True)


def test_memory_that_is_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "idle", False)
    assert "AssertionError" in found(points()[:1])
    monkeypatch.undo()
    keeping.release(most=None)


def test_an_interrupt_between_two_looks_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is raised wherever Python is, also while a submission looks at what is idle by now."""

    class State:
        over: bool | None = False

        @property
        def idle(self) -> bool:
            if self.over is None:
                raise KeyboardInterrupt
            return self.over

    monkeypatch.setattr(keeping, "_busy", deque())
    states = [State() for _ in range(3)]
    for state in states:
        keeping.until_idle(state, bytearray(1))
    states[1].over = None
    with pytest.raises(KeyboardInterrupt):
        keeping.release()
    assert {state for state, _ in keeping._busy} == set(states)
    states[0].over, states[1].over = True, False
    keeping.release()
    assert {state for state, _ in keeping._busy} == set(states[1:])


def test_jobs_whose_loss_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a job that was never collected come back to the pool."""
    monkeypatch.setattr(StreamJob, "_lose", lambda self: None)
    with pytest.raises(AssertionError):
        uncollected_jobs(flags=True)


# Submissions that nobody collects, while the layer lives on -------------------------------------


def uncollected_jobs(flags: bool) -> None:
    """Submissions whose syncs never come, between others whose results must be right; and their
    buffers are used again."""
    model = Model(3, flags=flags, count=1)
    runner: Any = model.runners[0]

    def lose(seed: int) -> None:
        runner.submit(*Inputs.random(2, seed).tensors, 1)
        runner._submission = None  # what an exception may leave

    for seed in range(8):
        lose(seed)
        model.gpu.run_some(seed)
        model.step(2, seed + 1)
        model.gpu.run_some(seed)
    model.gpu.run()
    pinned = living(model)
    for seed in range(40):
        lose(seed)
        model.gpu.run()
        model.step(2, seed % 8)
        model.gpu.run()
    assert living(model) == pinned
    model.pool.clear(lambda device: model.gpu.run())
    assert model.pool.count() == (0, 0)
    model.verify()


def living(model: Model) -> int:
    """Pieces of pinned memory."""
    return len([ref for ref in model.gpu.allocated if ref() is not None])


@WAYS
def test_uncollected_jobs(flags: bool) -> None:
    uncollected_jobs(flags)
