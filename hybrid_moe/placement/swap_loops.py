"""Loops of online placement: what has been routed lately, and which experts should change places.

Compiled by numba at their first call; importing this module imports numba. Arrays are [L, E] over
the layers that take part and the experts of the largest of them; a place without an expert is
`FIXED`. All of them belong to the caller, who may keep and compare them: nothing is hidden here.

**Averages.** The use of an expert is the number of its pairs, each of which fades by half in
`half_life` tokens: a sum that settles at rate * half_life / ln 2. There are two of them, a fast one
that notices another topic, and a slow one that tells experts apart which differ by little. A look
at n tokens at once multiplies a sum by q = 2^-(n / half_life) and adds (1 - q) * half_life / ln 2
times the rate, so the result does not depend on how often somebody looks; a prompt of many tokens
counts as one half-life, lest it drown what has been decoded.

**Noise.** Of pairs that come by chance, a sum u has variance u (1 + q) / 2, where q is what is left
of a pair of the beginning (a Poisson process through an exponential kernel). How much of the spread
of a layer's sums that explains says how far they are to be believed:

* All of it: the experts may be equal. Of C cold and H hot ones, one of the C * H differences is off
  by sqrt(2 ln(C H)) standard deviations now and then. Only one that chance gives once in `PERIODS`
  half-lives counts, and so equal experts stay where they are.
* Little of it: the experts do differ, and the one that looks better probably is. One standard
  deviation is enough, `PROBABLY`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
States = npt.NDArray[np.int8]

COLD, HOT, FIXED = 0, 1, 2
"""Of an expert: on the CPU, on the GPU, or not to be moved: others compute it, or it is none."""

FAST, SLOW = 0, 1
"""The two averages, first axis of what there is for each."""

LN2 = math.log(2)

PERIODS = 64
"""Half-lives in which a layer of equal experts may swap two of them by mistake."""

PROBABLY = 1.0
"""Standard deviations by which an expert of a layer whose experts differ must look better."""

UNSURE = 3.0
"""Standard deviations of the spread of equal experts that are taken for chance."""

_F = TypeVar("_F", bound=Callable[..., object])


def _compiled(function: _F) -> _F:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _F = numba.njit(nogil=True, cache=False)(function)
    return compiled


@_compiled
def observe(
    routed: Ints,
    seen: Ints,
    top_k: Floats,
    half_life: Floats,
    state: States,
    first: States,
    use: Floats,
    clock: Floats,
    pairs: Ints,
) -> None:
    """Take in what has been routed since the last look.

    Args:
        routed: [L, E] pairs of all time. seen: those of the last look; becomes `routed`.
        top_k: [L] experts of a token.
        half_life: [2, L] tokens.
        state: [L, E] where experts are. first: where they were to begin with.
        use: [2, L, E] the averages, in pairs.
        clock: [L] tokens so far, of which one look counts at most a fast half-life.
        pairs: [L, 3] so far: of hot experts, of all that can move, and of hot ones if nothing had
            ever moved.
    """
    layers, experts = routed.shape
    for layer in range(layers):
        new = 0
        for e in range(experts):
            count = routed[layer, e] - seen[layer, e]
            if count == 0:
                continue
            new += count
            if state[layer, e] != FIXED:
                pairs[layer, 1] += count
                if state[layer, e] == HOT:
                    pairs[layer, 0] += count
                if first[layer, e] == HOT:
                    pairs[layer, 2] += count
        if new == 0:
            continue
        tokens = new / top_k[layer]
        for scale in range(2):
            life = half_life[scale, layer]
            keep = 0.5 ** (min(tokens, life) / life)
            gain = (1 - keep) * life / (LN2 * tokens)
            for e in range(experts):
                count = routed[layer, e] - seen[layer, e]
                use[scale, layer, e] = keep * use[scale, layer, e] + gain * count
        clock[layer] += min(tokens, half_life[FAST, layer])
        for e in range(experts):
            seen[layer, e] = routed[layer, e]


@_compiled
def _deviations(sums: Floats, states: States, left: float, pairs: int) -> float:
    """By how many standard deviations two experts of a layer must differ.

    Args:
        sums: [E] of one average.
        states: [E].
        left: what is left of a pair of the beginning.
        pairs: C * H.
    """
    count = 0
    mean = spread = 0.0
    for e in range(len(sums)):
        if states[e] != FIXED:
            count += 1
            mean += sums[e]
    mean /= count
    for e in range(len(sums)):
        if states[e] != FIXED:
            spread += (sums[e] - mean) ** 2 / count
    chance = mean * (1 + left) / 2 * (1 + UNSURE * math.sqrt(2 / count))
    explained = min(1.0, chance / spread) if spread > 0 else 1.0
    equals = math.sqrt(2 * math.log(pairs * PERIODS))
    return PROBABLY + explained * max(0.0, equals - PROBABLY)


@_compiled
def by_chance(
    sums: Floats, states: States, life: float, now: float, above: float, below: float
) -> float:
    """By how much the sums `above` and `below` of a cold and a hot expert may differ by chance.

    Args:
        sums, states: [E] of one average of a layer.
        life: its half-life. now: the layer's clock.
    """
    colds = hots = 0
    for e in range(len(states)):
        if states[e] == COLD:
            colds += 1
        elif states[e] == HOT:
            hots += 1
    left = 0.5 ** (now / life)
    deviations = _deviations(sums, states, left, colds * max(hots, 1))
    return deviations * math.sqrt((above + below) * (1 + left) / 2)


@_compiled
def _best_of_layer(
    layer: int,
    use: Floats,
    half_life: Floats,
    state: States,
    free: int,
    rest_until: Floats,
    now: float,
    margin: float,
    payback: float,
    choice: Ints,
) -> float:
    """The swap of a layer that gains most: pairs a token that the GPU takes over from the CPU, 0 if
    there is none. `choice[layer]` becomes (down, up), down -1 where a slot is free."""
    experts = state.shape[1]
    best = 0.0
    for scale in range(2):
        up = down = -1
        for e in range(experts):
            if rest_until[layer, e] > now:
                continue
            if state[layer, e] == COLD:
                if up < 0 or use[scale, layer, e] > use[scale, layer, up]:
                    up = e
            elif state[layer, e] == HOT and (
                down < 0 or use[scale, layer, e] < use[scale, layer, down]
            ):
                down = e
        if up < 0 or (down < 0 and free == 0):
            continue
        above = use[scale, layer, up]
        below = 0.0
        if free > 0:
            down = -1
        else:
            below = use[scale, layer, down]
            if scale == SLOW and use[FAST, layer, up] <= use[FAST, layer, down]:
                continue  # it was so; lately it is not
        life = half_life[scale, layer]
        chance = by_chance(use[scale, layer], state[layer], life, now, above, below)
        if (above - below) <= max(chance, margin * above, payback / LN2):
            continue
        gain = (above - below) * LN2 / life
        if gain > best:
            best = gain
            choice[layer, 0], choice[layer, 1] = down, up
    return best


@_compiled
def plan_swaps(
    use: Floats,
    half_life: Floats,
    state: States,
    slots: Ints,
    rest_until: Floats,
    clock: Floats,
    nbytes: Floats,
    copies: float,
    budget: float,
    margin: float,
    payback: float,
    swaps: Ints,
) -> float:
    """The swaps that gain most for what they move, as many as the budget has bytes for.

    Args:
        use, half_life, clock: of `observe`.
        state: becomes what it is after the swaps.
        slots: [L] experts for which the GPU has room.
        rest_until: [L, E] tokens of the layer's clock before which an expert stays; those that are
            swapped rest for a fast half-life from now on, so none moves twice within one.
        nbytes: [L] of an expert.
        copies: of an expert that a demotion takes, 1, or 0 where the CPU has kept it.
        budget: bytes.
        margin: share by which the better one must be better at least.
        payback: pairs of a half-life that a swap must bring at least: what moving costs.
        swaps: [n, 3] becomes (layer, expert that goes down or -1, expert that goes up), in the
            order in which they are to be done; the rest -1.

    Returns:
        Bytes that the swaps move.
    """
    layers, experts = state.shape
    free = np.zeros(layers, np.int64)
    for layer in range(layers):
        free[layer] = slots[layer]
        for e in range(experts):
            if state[layer, e] == HOT:
                free[layer] -= 1
    choice = np.full((layers, 2), -1, np.int64)
    gains = np.zeros(layers)
    for layer in range(layers):
        gains[layer] = _best_of_layer(
            layer, use, half_life, state, free[layer], rest_until, clock[layer], margin, payback,
            choice,
        )  # fmt: skip
    swaps[:, :] = -1
    moved = 0.0
    for n in range(len(swaps)):
        layer = int(np.argmax(gains))  # a pair saves a read of so many bytes as its swap moves
        down, up = choice[layer]
        cost = nbytes[layer] * (1.0 + (copies if down >= 0 else 0.0))
        if gains[layer] <= 0 or moved + cost > budget:
            break
        moved += cost
        swaps[n, 0], swaps[n, 1], swaps[n, 2] = layer, down, up
        if down >= 0:
            state[layer, down] = COLD
            rest_until[layer, down] = clock[layer] + half_life[FAST, layer]
        else:
            free[layer] -= 1
        state[layer, up] = HOT
        rest_until[layer, up] = clock[layer] + half_life[FAST, layer]
        gains[layer] = _best_of_layer(
            layer, use, half_life, state, free[layer], rest_until, clock[layer], margin, payback,
            choice,
        )  # fmt: skip
    return moved


def prepare() -> None:
    """Compile the loops now, which takes seconds, and not when they are first needed."""
    one, counts, state = np.zeros((1, 1)), np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int8)
    use, half_life, clock = np.zeros((2, 1, 1)), np.ones((2, 1)), np.ones(1)
    pairs, swaps = np.zeros((1, 3), np.int64), np.zeros((1, 3), np.int64)
    observe(counts, counts.copy(), clock, half_life, state, state.copy(), use, clock, pairs)
    plan_swaps(
        use, half_life, state, np.ones(1, np.int64), one, clock, clock, 1.0, 0.0, 0.0, 0.0, swaps
    )
