"""Experts that a batch meets: expectations against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.runtime.deferral import split_deferred
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.layer_work import experts_met, uniform_deferred, uniform_met

E, K = 4, 2
SETS = list(itertools.combinations(range(E), K))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_uniform_experts_are_counted(tokens: int) -> None:
    """Over all batches of tokens that each take one of the sets of k."""
    met = pairs = 0.0
    batches = list(itertools.product(SETS, repeat=tokens))
    for batch in batches:
        cold = [e for chosen in batch for e in chosen if e >= 2]
        met += len(set(cold)) / len(batches)
        pairs += len(cold) / len(batches)
    found = uniform_met(E - 2, E, K, tokens)
    assert (found.experts, found.pairs) == pytest.approx((met, pairs))
    chosen = np.arange(E) >= 2
    again = experts_met(np.full(E, K / E), tokens, chosen)
    assert (again.experts, again.pairs) == pytest.approx((met, pairs))


@pytest.mark.parametrize(("tokens", "depth"), [(1, 1), (2, 0), (2, 1), (2, 2), (3, 1)])
def test_deferred_experts_are_counted(tokens: int, depth: int) -> None:
    """The same, each token weighting its experts in every order, as `demand_of` splits them."""
    ordered = list(itertools.permutations(range(E), K))
    met = pairs = 0.0
    batches = list(itertools.product(ordered, repeat=tokens))
    weights = np.tile([0.6, 0.4], (tokens, 1))
    for batch in batches:
        demand = demand_of(np.array(batch), weights, np.zeros(E, bool), depth)
        met += demand.deferrable.sum() / len(batches)
        pairs += demand.tokens[demand.deferrable].sum() / len(batches)
    found = uniform_deferred(E, E, K, tokens, depth)
    assert (found.experts, found.pairs) == pytest.approx((met, pairs))


def test_probable_experts_are_met_more_often() -> None:
    p = np.array([1.0, 0.5, 0.0])
    found = experts_met(p, 3)
    assert found.experts == pytest.approx(1 + (1 - 0.5**3))
    assert found.pairs == 4.5


@given(
    st.integers(1, 4).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(-1, E), min_size=K, max_size=K, unique=True),
            min_size=tokens, max_size=tokens,
        )
    ),
    st.integers(0, K),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_may_be_deferred_is_what_the_runtime_defers(
    ids: list[list[int]], depth: int, seed: int
) -> None:
    weights = np.random.default_rng(seed).random((len(ids), K))
    demand = demand_of(ids, weights, np.zeros(E, bool), depth)
    now, later = split_deferred(torch.tensor(ids), torch.tensor(weights), K - depth, E)
    assert set(demand.experts[demand.deferrable].tolist()) == set(later[later >= 0].tolist())
    assert set(demand.experts[~demand.deferrable].tolist()) == set(now[now >= 0].tolist())


def test_a_demand() -> None:
    ids = [[0, 1, 2], [1, 3, 9], [-1, 4, 1]]  # of five experts
    weights = [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.9, 0.1, 0.2]]
    hot = np.array([False, False, False, True, False])
    demand = demand_of(ids, weights, hot, max_deferred=1)
    assert demand.experts.tolist() == [0, 1, 2, 4]
    assert demand.tokens.tolist() == [1, 3, 1, 1]
    assert demand.weight == pytest.approx([0.5, 0.7, 0.2, 0.1])
    # token 0 needs 0 and 1; token 1 needs 3 and, as 9 is no expert, 1; token 2 needs 1 and 4
    assert demand.deferrable.tolist() == [False, False, True, False]
    assert (demand.hot.experts, demand.hot.pairs) == (1, 1)
    assert not demand_of(ids, weights, hot).deferrable.any()
    assert demand_of(ids, weights, hot, max_deferred=3).deferrable.all()
    with pytest.raises(ValueError, match=r"ids have shape \[3, 3\], weights \[1, 3\]"):
        demand_of(ids, weights[:1], hot)
    with pytest.raises(ValueError, match="max_deferred is -1"):
        demand_of(ids, weights, hot, -1)
