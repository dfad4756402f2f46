"""Which experts may run late, and that a late result reaches the right layer or is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.routing_split import RoutingSplit
from hybrid_moe.runtime.deferral import DeferralChain, split_deferred
from tests.hybrid_moe.members import Layer

E = 6
SCORES = st.sampled_from([-3e38, -0.75, -0.25, -0.0, 0.0, 1e-40, 0.25, 0.75, 3e38])
"""Ties among them too."""


def by_torch(ids: torch.Tensor, scores: torch.Tensor, protected_k: int) -> list[torch.Tensor]:
    now, later = split_deferred(ids, scores, protected_k, E)
    assert now.dtype == later.dtype == ids.dtype
    return [now, later]


def compiled(ids: torch.Tensor, scores: torch.Tensor, protected_k: int) -> list[torch.Tensor]:
    """What a layer on CPU tensors does."""
    ids = ids.to(torch.int64)
    split = [torch.full_like(ids, -7) for _ in range(2)]
    cut = RoutingSplit(E, ids.shape[1], protected_k)
    for _ in range(2):  # what the first batch protects is forgotten
        ignored = cut(len(ids), *(tensor.data_ptr() for tensor in (ids, scores, *split)))
        assert ignored == sum(not 0 <= e < E for e in ids.flatten().tolist())
    return split


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, k = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    ids = [[draw(st.integers(-2, E + 1)) for _ in range(k)] for _ in range(tokens)]
    scores = [[draw(SCORES) for _ in range(k)] for _ in range(tokens)]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return (
        torch.tensor(ids, dtype=dtype).reshape(tokens, k),
        torch.tensor(scores).reshape(tokens, k),
    )


@pytest.mark.parametrize("split", [by_torch, compiled])
@given(routings(), st.integers(-1, 5))
def test_split_follows_its_definition(
    split: Callable[..., list[torch.Tensor]],
    routing: tuple[torch.Tensor, torch.Tensor],
    protected_k: int,
) -> None:
    ids, scores = routing
    now, later = split(ids, scores, protected_k)
    protected = set()
    for row, score in zip(ids.tolist(), scores.tolist(), strict=True):
        valid = [slot for slot, expert in enumerate(row) if 0 <= expert < E]
        best = sorted(valid, key=lambda slot: (-score[slot], slot))[: max(protected_k, 0)]
        protected |= {row[slot] for slot in best}
    for got, kept in ((now, True), (later, False)):
        expected = [
            [e if 0 <= e < E and (e in protected) == kept else -1 for e in row]
            for row in ids.tolist()
        ]
        assert got.tolist() == expected


def test_an_expert_that_one_token_protects_runs_now_for_all() -> None:
    ids = torch.tensor([[0, 1], [2, 0]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    now, later = split_deferred(ids, scores, 1, E)
    assert now.tolist() == [[0, -1], [2, 0]]
    assert later.tolist() == [[-1, 1], [-1, -1]]


@dataclass
class Job:
    tokens: int
    discarded: bool = False
    failure: str | None = None

    def result(self, stream: object = None) -> torch.Tensor:
        raise AssertionError("a chain never asks for results")

    def discard(self) -> None:
        self.discarded = True
        if self.failure is not None:
            raise RuntimeError(self.failure)


def chain_of(*indices: int) -> tuple[DeferralChain, list[Layer]]:
    """A chain and its layers, which the caller keeps alive."""
    chain, layers = DeferralChain(), [Layer(i) for i in indices]
    for layer in layers:
        chain.join(layer)
    return chain, layers


def test_next_layer_skips_dense_dead_and_empty_ones() -> None:
    chain, layers = chain_of(7, 1, 3)
    chain.join(Layer(9))  # dies at once
    assert [chain.after(i) for i in (1, 3, 7)] == [3, 7, None]
    layers[2].loaded = False
    assert chain.after(1) == 7
    layers[2].loaded = True
    del layers[2]
    assert chain.after(1) == 7


def test_a_place_is_given_once_and_again_when_it_is_free() -> None:
    chain, (first, second) = chain_of(0, 1)
    with pytest.raises(ValueError, match="has a layer 1 already"):
        chain.join(Layer(1))
    with pytest.raises(ValueError, match=r"hidden_size is 96, but layer 0 .* has 64"):
        chain.join(Layer(2, hidden_size=96))
    chain.leave(Layer(1))  # not the one that is in it
    assert chain.after(0) == 1
    chain.leave(second)
    assert chain.after(0) is None
    again = Layer(1)
    chain.join(again)
    assert chain.after(0) == 1
    assert not first.drops


def test_deferred_job_is_taken_once() -> None:
    chain, layers = chain_of(0, 2)
    job = Job(4)
    chain.carry(0, 2, job)
    assert [chain.take(2, 4) for _ in range(2)] == [job, None]
    assert not job.discarded and len(layers) == 2


@pytest.mark.parametrize(
    ("called", "tokens", "message"),
    [
        (0, 4, "layer 0 was called before layer 2 collected the experts that layer 0"),
        (1, 4, "layer 1 was called before layer 2 collected the experts that layer 0"),
        (3, 4, "layer 3 was called before layer 2 collected the experts that layer 0"),
        (2, 5, "layer 2 was called with 5 tokens, but layer 0 deferred experts of 4 tokens"),
    ],
)
def test_a_job_that_cannot_be_taken_is_an_error_once(
    called: int, tokens: int, message: str
) -> None:
    chain, layers = chain_of(0, 1, 2, 3)
    job = Job(4)
    chain.carry(0, 2, job)
    with pytest.raises(RuntimeError, match=message):
        chain.take(called, tokens)
    assert job.discarded
    assert [layer.drops for layer in layers] == [1] * 4
    assert chain.take(called, tokens) is None


def test_a_job_goes_with_the_layer_that_it_is_for() -> None:
    chain, layers = chain_of(0, 1)
    for end in (lambda: chain.leave(layers.pop()), layers.pop):
        job = Job(4)
        chain.carry(0, 1, job)
        end()
        assert chain.take(0, 4) is None and job.discarded
        layers.append(Layer(1))
        chain.join(layers[-1])
    job = Job(4)
    chain.carry(0, 1, job)
    layers[-1] = Layer(1)  # made anew
    chain.join(layers[-1])
    assert chain.take(1, 4) is None and job.discarded


def test_reset_drops_everything_even_what_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    chain, layers = chain_of(0, 1)
    job = Job(4, failure="a worker")
    chain.carry(0, 1, job)
    with caplog.at_level(logging.WARNING, logger="hybrid_moe"):
        chain.reset()
    assert job.discarded and [layer.drops for layer in layers] == [1, 1]
    assert "a job that was dropped had failed: a worker" in caplog.text
    chain.reset()
    assert chain.carried is None


def test_only_what_a_layer_has_deferred_is_dropped() -> None:
    chain, _layers = chain_of(0, 1, 2)
    job = Job(4)
    chain.carry(0, 1, job)
    chain.drop(1)
    assert not job.discarded
    chain.drop(0)
    assert job.discarded and chain.carried is None
