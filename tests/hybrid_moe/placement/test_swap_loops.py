"""The loops of online placement against plain Python, and what they promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement.swap_loops import COLD, FAST, FIXED, HOT, SLOW, observe, plan_swaps

Array = npt.NDArray[Any]


@dataclass
class State:
    """All arrays of L layers of E experts, k of a token; the first `hot` are on the GPU."""

    L: int
    E: int
    k: int
    hot: int
    life: float = 16.0
    slots: int = -1
    arrays: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        L, E = self.L, self.E
        self.routed, self.seen = np.zeros((L, E), np.int64), np.zeros((L, E), np.int64)
        self.state = np.full((L, E), COLD, np.int8)
        self.state[:, : self.hot] = HOT
        self.first = self.state.copy()
        self.top_k = np.full(L, float(self.k))
        self.half_life = np.array([[self.life] * L, [8 * self.life] * L])
        self.use, self.clock = np.zeros((2, L, E)), np.zeros(L)
        self.pairs = np.zeros((L, 3), np.int64)
        self.rest_until = np.zeros((L, E))
        self.nbytes = np.ones(L)
        self.room = np.full(L, self.hot if self.slots < 0 else self.slots, np.int64)

    def look(self, counts: Array) -> None:
        self.routed += counts
        observe(
            self.routed, self.seen, self.top_k, self.half_life, self.state, self.first, self.use,
            self.clock, self.pairs,
        )  # fmt: skip

    def plan(
        self, budget: float = 1e9, margin: float = 0.1, payback: float = 0.0, copies: float = 1.0
    ) -> list[tuple[int, int, int]]:
        swaps = np.full((64, 3), 7, np.int64)
        moved = plan_swaps(
            self.use, self.half_life, self.state, self.room, self.rest_until, self.clock,
            self.nbytes, copies, budget, margin, payback, swaps,
        )  # fmt: skip
        made = [(int(at), int(down), int(up)) for at, down, up in swaps if at >= 0]
        assert (swaps[len(made) :] == -1).all()
        cost = sum(self.nbytes[at] * (1 + copies * (down >= 0)) for at, down, _ in made)
        assert moved == pytest.approx(cost) and moved <= budget
        return made


def tokens(rng: np.random.Generator, shares: Array, count: int, k: int) -> Array:
    """Pairs [L, E] of so many tokens, each with k distinct experts by the shares."""
    keys = np.log(shares)[:, None] + rng.gumbel(size=(len(shares), count, shares.shape[1]))
    chosen = np.argpartition(-keys, k, axis=-1)[..., :k]
    return np.stack([np.bincount(row.ravel(), minlength=shares.shape[1]) for row in chosen])


def test_an_average_is_the_sum_of_pairs_that_fade() -> None:
    """Looked at after each token: every pair counts 2^-age, averaged over its token's time."""
    rng, given = np.random.default_rng(0), State(1, 6, 2, 2, life=5.0)
    history = [tokens(rng, np.ones((1, 6)), 1, 2)[0] for _ in range(40)]
    for counts in history:
        given.look(counts[None])
    for scale, life in ((FAST, 5.0), (SLOW, 40.0)):
        expected = np.zeros(6)
        for age, counts in enumerate(reversed(history)):
            within = np.linspace(age, age + 1, 20001)
            expected += counts * np.mean(2.0 ** (-within / life))
        assert np.allclose(given.use[scale, 0], expected, rtol=1e-4)
    assert given.clock[0] == 40 and given.pairs[0, 1] == 80


@given(parts=st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_how_often_one_looks_does_not_matter(parts: list[int]) -> None:
    """Of a steady stream: one pair of each of two experts in each token."""
    often, seldom = State(1, 4, 2, 1), State(1, 4, 2, 1)
    for part in parts:
        for _ in range(part):
            often.look(np.array([[1, 1, 0, 0]]))
        seldom.look(part * np.array([[1, 1, 0, 0]]))
    assert np.allclose(often.use, seldom.use)
    assert often.clock[0] == pytest.approx(seldom.clock[0])
    settled = 16.0 / math.log(2)
    assert often.use[FAST, 0, 0] <= settled


def test_a_long_prompt_is_one_half_life() -> None:
    given = State(1, 4, 2, 1)
    given.look(np.array([[10_000, 0, 10_000, 0]]))
    assert given.clock[0] == 16
    again = State(1, 4, 2, 1)
    again.look(np.array([[16, 0, 16, 0]]))
    assert np.allclose(given.use[FAST], again.use[FAST])


def test_pairs_are_counted_where_they_were_and_would_have_been() -> None:
    given = State(2, 4, 2, 2)
    given.state[0, 3] = given.first[0, 3] = FIXED
    given.look(np.array([[3, 1, 2, 10], [0, 0, 0, 0]]))
    given.state[0, 0], given.state[0, 2] = COLD, HOT
    given.look(np.array([[5, 1, 7, 0], [4, 0, 0, 4]]))
    assert given.pairs.tolist() == [[3 + 1 + 1 + 7, 6 + 13, 4 + 6], [4, 8, 4]]
    given.look(np.zeros((2, 4), np.int64))
    assert given.pairs[:, 1].tolist() == [19, 8], "nothing new"


def expected_swap(given: State, at: int, margin: float, payback: float) -> Any:
    """(gain, down, up) of one layer in plain words; None where nothing should move."""
    hot = [e for e in range(given.E) if given.state[at, e] == HOT]
    cold = [e for e in range(given.E) if given.state[at, e] == COLD]
    free = given.room[at] - len(hot)
    found = None
    for scale in (FAST, SLOW):
        use = given.use[scale, at]
        movable = [e for e in cold if given.rest_until[at, e] <= given.clock[at]]
        leaving = [e for e in hot if given.rest_until[at, e] <= given.clock[at]]
        if not movable or (not leaving and not free):
            continue
        up = max(movable, key=lambda e: (use[e], -e))
        down = -1 if free else min(leaving, key=lambda e: (use[e], e))
        below = 0.0 if free else use[down]
        left = 2.0 ** (-given.clock[at] / given.half_life[scale, at])
        sums = use[[*hot, *cold]]
        chance = sums.mean() * (1 + left) / 2 * (1 + 3 * math.sqrt(2 / len(sums)))
        explained = min(1.0, chance / sums.var()) if sums.var() > 0 else 1.0
        equals = math.sqrt(2 * math.log(len(cold) * max(1, len(hot)) * 64))
        noise = 1 + explained * max(0.0, equals - 1)
        noise *= math.sqrt((use[up] + below) * (1 + left) / 2)
        if scale == SLOW and not free and given.use[FAST, at, up] <= given.use[FAST, at, down]:
            continue
        if use[up] - below > max(noise, margin * use[up], payback / math.log(2)):
            gain = (use[up] - below) * math.log(2) / given.half_life[scale, at]
            if found is None or gain > found[0]:
                found = (gain, down, up)
    return found


@st.composite
def states(draw: st.DrawFn) -> State:
    E = draw(st.integers(2, 7))
    hot = draw(st.integers(0, E))
    made = State(draw(st.integers(1, 3)), E, 1, hot, slots=draw(st.integers(max(1, hot), E)))
    uses = st.floats(0, 400, allow_nan=False).map(lambda x: round(x, 1))
    for index in np.ndindex(*made.use.shape):
        made.use[index] = draw(uses)
    made.clock[:] = 50
    for index in np.ndindex(*made.state.shape):
        made.rest_until[index] = draw(st.sampled_from((0.0, 60.0)))
        if draw(st.integers(0, 5)) == 0 and made.state[index] == COLD:
            made.state[index] = FIXED
    return made


@settings(max_examples=300)
@given(made=states(), payback=st.sampled_from((0.0, 8.0)), copies=st.sampled_from((0.0, 1.0)))
def test_a_plan_takes_the_best_swaps_one_after_another(
    made: State, payback: float, copies: float
) -> None:
    reference = State(made.L, made.E, 1, made.hot, slots=int(made.room[0]))
    for name in ("use", "state", "rest_until", "clock"):
        getattr(reference, name)[...] = getattr(made, name)
    wanted = []
    while True:
        best = [(expected_swap(reference, at, 0.1, payback), at) for at in range(made.L)]
        real = [(found, at) for found, at in best if found is not None]
        if not real:
            break
        (_, down, up), at = max(real, key=lambda item: (item[0][0], -item[1]))
        wanted.append((at, down, up))
        reference.state[at, up] = HOT
        reference.rest_until[at, up] = 50 + reference.life
        if down >= 0:
            reference.state[at, down] = COLD
            reference.rest_until[at, down] = 50 + reference.life
    before = made.state.copy()
    assert made.plan(payback=payback, copies=copies) == wanted
    assert np.array_equal(made.state, reference.state)
    assert ((made.state == FIXED) == (before == FIXED)).all()
    assert ((made.state == HOT).sum(1) <= made.room).all()


def test_a_budget_is_kept_and_the_best_comes_first() -> None:
    given = State(3, 4, 1, 1)
    given.nbytes[:] = 10
    given.use[FAST] = [[0, 50, 0, 0], [0, 0, 200, 0], [0, 0, 0, 100]]
    assert given.plan(budget=45) == [(1, 0, 2), (2, 0, 3)]
    assert given.plan(budget=19) == []
    assert given.plan(budget=20) == [(0, 0, 1)]


def test_a_free_slot_needs_nobody_to_leave() -> None:
    given = State(1, 4, 1, 1, slots=2)
    given.use[FAST] = [[90, 50, 0, 0]]
    assert given.plan(budget=1, copies=1.0) == [(0, -1, 1)]
    assert given.plan() == []


@pytest.mark.parametrize(("E", "k", "hot"), [(16, 4, 4), (64, 6, 8), (256, 8, 32)])
def test_equal_experts_stay_where_they_are(E: int, k: int, hot: int) -> None:
    """Two hundred half-lives of eight looks each, in which chance gives two layers 6 swaps."""
    rng, life = np.random.default_rng(E), 64 * E / k
    given = State(2, E, k, hot, life=life)
    swaps = 0
    for _ in range(1600):
        given.look(rng.poisson(life / 8 * k / E, size=(2, E)))
        swaps += len(given.plan(payback=8.0))
    assert swaps <= 12


def test_what_is_used_most_comes_and_stays() -> None:
    """Popular experts are hot soon, and hardly anything moves any more: those at the edge, which
    differ by a tenth, perhaps once in ten half-lives."""
    rng, shares = np.random.default_rng(1), 1.0 / (1 + np.arange(32.0))
    order = np.stack([rng.permutation(32) for _ in range(3)])
    weights = np.stack([shares[np.argsort(row)] for row in order])
    given = State(3, 32, 4, 8, life=512.0)
    moves = []
    for _ in range(400):
        given.look(tokens(rng, weights, 64, 4))
        moves.append(len(given.plan(payback=8.0)))
    hot = [set(np.flatnonzero(row == HOT)) for row in given.state]
    for chosen, row in zip(hot, order, strict=True):
        assert set(row[:5]) <= chosen, "the clear favourites"
        assert len(chosen & set(row[:8])) >= 7
    assert sum(moves[200:]) <= 3 * 25 / 10 and sum(moves) >= 3 * 5


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_moves_twice_within_a_half_life(seed: int) -> None:
    """Even where the topic changes at every look."""
    rng = np.random.default_rng(seed)
    given = State(2, 8, 2, 3, life=8.0)
    last = np.full((2, 8), -1e9)
    for _ in range(60):
        shares = rng.dirichlet(np.full(8, 0.1), size=2) + 1e-6
        given.look(tokens(rng, shares, int(rng.integers(1, 8)), 2))
        for at, down, up in given.plan():
            for e in (down, up):
                if e >= 0:
                    assert given.clock[at] - last[at, e] >= 8.0
                    last[at, e] = given.clock[at]
