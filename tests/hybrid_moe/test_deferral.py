"""Which experts may run late, and that a late result reaches the right layer or is an error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.deferral import Chain, split_deferred

E = 6


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, k = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    ids = [[draw(st.integers(-2, E + 1)) for _ in range(k)] for _ in range(tokens)]
    scores = [[draw(st.integers(0, 3)) / 4 for _ in range(k)] for _ in range(tokens)]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return (
        torch.tensor(ids, dtype=dtype).reshape(tokens, k),
        torch.tensor(scores).reshape(tokens, k),
    )


@given(routings(), st.integers(-1, 5))
def test_split_follows_its_definition(
    routing: tuple[torch.Tensor, torch.Tensor], protected_k: int
) -> None:
    ids, scores = routing
    now, later = split_deferred(ids, scores, protected_k, E)
    assert now.dtype == later.dtype == ids.dtype
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
class Layer:
    layer_idx: int


@dataclass
class Job:
    tokens: int
    discarded: bool = False

    def result(self, stream: object = None) -> torch.Tensor:
        raise AssertionError("a chain never asks for results")

    def discard(self) -> None:
        self.discarded = True


def test_next_layer_skips_dense_ones_and_dead_ones() -> None:
    layers = [Layer(i) for i in (7, 1, 3)]
    for layer in layers:
        chain = Chain.join("model", layer)
    assert Chain.join("model", Layer(9)) is chain  # its layer dies at once
    assert [chain.after(i) for i in (1, 3, 7)] == [3, 7, None]
    del layers[2], layer
    assert chain.after(1) == 7


def test_second_copy_of_a_model_has_its_own_chain() -> None:
    first, second = ([Layer(0), Layer(1)] for _ in range(2))
    chains = [[Chain.join("copies", layer) for layer in layers] for layers in (first, second)]
    assert chains[0][0] is chains[0][1]
    assert chains[1][0] is chains[1][1]
    assert chains[0][0] is not chains[1][0]
    assert Chain.join("another", Layer(1)) is not chains[1][0]


def test_deferred_job_is_collected_once() -> None:
    chain, job = Chain(), Job(4)
    chain.check_free(0, 2)
    chain.defer(0, 2, job)
    assert chain.collect(1, 4) is None
    assert [chain.collect(2, 4) for _ in range(2)] == [job, None]
    assert not job.discarded


def test_job_that_nobody_collects_is_an_error_once() -> None:
    chain, job = Chain(), Job(4)
    chain.defer(0, 2, job)
    with pytest.raises(RuntimeError, match="before layer 2 collected the experts that layer 0"):
        chain.check_free(0, 2)
    assert job.discarded
    chain.check_free(0, 2)


def test_job_of_another_batch_is_an_error_once() -> None:
    chain, job = Chain(), Job(4)
    chain.defer(0, 2, job)
    with pytest.raises(RuntimeError, match="layer 2 was called with 5 tokens, but layer 0"):
        chain.collect(2, 5)
    assert job.discarded
    assert chain.collect(2, 5) is None
