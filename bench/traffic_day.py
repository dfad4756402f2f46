"""A day of traffic on a server whose experts move, in seconds: nothing may drift or oscillate.

    python bench/traffic_day.py [--hours 24] [--experts 64] [--topics 6]

Requests come and go with the hour, in a mix of topics that shifts through the day, with prompts in
between. Each second the routers' counts are drawn by the topics of the tokens of that second, and
the loops of online placement (`placement.swap_loops`) look at them and swap within their budget, as
a server would. Shown are, hour by hour, the hit rate beside that of the best placement that does
not move and knows the hour, and what moved.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from hybrid_moe.placement.online import (
    BURST_SECONDS,
    HALF_LIFE_PAIRS,
    LINK_BYTES,
    MARGIN,
    PAYBACK_PAIRS,
    SLOWER,
)
from hybrid_moe.placement.swap_loops import COLD, HOT, observe, plan_swaps

HOUR = 3600


@dataclass(frozen=True)
class Server:
    """What is simulated.

    Attributes:
        layers, experts, top_k, hot: L, E, k, and experts of a layer on the GPU.
        nbytes: of an expert.
        tokens_per_second: of all requests together, at the busiest hour.
    """

    layers: int = 4
    experts: int = 64
    top_k: int = 4
    hot: int = 16
    nbytes: float = 13.2e6
    tokens_per_second: float = 60.0


@dataclass(frozen=True)
class Day:
    """What came of it, by hour.

    Attributes:
        tokens, pairs, hits: [hours].
        optimum: [hours] pairs that the best unmoving placement of the hour would have had hot.
        swaps, returns: [hours] experts that came to the GPU, and those of them that had left it in
            the last two half-lives.
        moved: [hours] bytes.
        broken: looks after which a layer had more or fewer hot experts than slots.
        routed: all pairs that were drawn.
    """

    tokens: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    optimum: npt.NDArray[np.int64]
    swaps: npt.NDArray[np.int64]
    returns: npt.NDArray[np.int64]
    moved: npt.NDArray[np.float64]
    broken: int
    routed: int


def popularity(server: Server, topics: int, seed: int) -> npt.NDArray[np.float64]:
    """[topics, L, E] shares of pairs: a part that all topics have in common and one of their own,
    each with a few favourites and a long tail (rank^-0.8)."""
    rng = np.random.default_rng(seed)
    ranks = (1.0 + np.arange(server.experts)) ** -0.8

    def shuffled() -> npt.NDArray[np.float64]:
        return np.stack([ranks[rng.permutation(server.experts)] for _ in range(server.layers)])

    common = shuffled()
    shares = np.stack([0.4 * common + 0.6 * shuffled() for _ in range(topics)])
    normed: npt.NDArray[np.float64] = shares / shares.sum(-1, keepdims=True)
    return normed


def traffic(server: Server, topics: int, seconds: int, seed: int) -> npt.NDArray[np.float64]:
    """[seconds, topics] tokens: requests of random length and topic, more of them by day, the
    topics' shares wandering with the hours; the first second of each has its prompt."""
    rng = np.random.default_rng(seed)
    time = np.arange(seconds)
    busy = 0.55 - 0.45 * np.cos(2 * np.pi * time / (24 * HOUR))
    phase = 2 * np.pi * (time[:, None] / (6 * HOUR) + np.arange(topics) / topics)
    weights = np.exp(2.5 * np.cos(phase))
    weights /= weights.sum(1, keepdims=True)
    tokens = np.zeros((seconds, topics))
    rate, length = 12.0, 40.0  # tokens of a request in a second, and seconds
    starts = np.flatnonzero(rng.random(seconds) < busy * server.tokens_per_second / (rate * length))
    for start in starts:
        topic = rng.choice(topics, p=weights[start])
        end = start + 1 + int(rng.exponential(length))
        tokens[start, topic] += 50 + rng.exponential(600.0)
        tokens[start:end, topic] += rate
    return tokens


@numba.njit(nogil=True, cache=False)
def _run(
    shares: Any, tokens: Any, top_k: float, hot: int, nbytes: float, budget: float, half_life: Any,
    seed: int, hits: Any, pairs: Any, swaps: Any, returns: Any, moved: Any, by_hour: Any,
) -> int:  # fmt: skip
    """Fills the last six, [hours] and [hours, L, E]; returns `Day.broken`."""
    np.random.seed(seed)
    topics, layers, experts = shares.shape
    routed = np.zeros((layers, experts), np.int64)
    seen = routed.copy()
    state = np.full((layers, experts), COLD, np.int8)
    state[:, :hot] = HOT
    first = state.copy()
    use, clock = np.zeros((2, layers, experts)), np.zeros(layers)
    counted, rest_until = np.zeros((layers, 3), np.int64), np.zeros((layers, experts))
    left_at = np.full((layers, experts), -1e18)
    slots, sizes = np.full(layers, hot, np.int64), np.full(layers, nbytes)
    each, table = np.full(layers, top_k), np.zeros((64, 3), np.int64)
    burst = max(BURST_SECONDS * budget, 2 * nbytes)
    allowance, broken = burst, 0
    for second in range(len(tokens)):
        hour = second // HOUR
        allowance = min(burst, allowance + budget)
        before = counted.sum(0)
        for layer in range(layers):
            for e in range(experts):
                expected = 0.0
                for topic in range(topics):
                    expected += tokens[second, topic] * shares[topic, layer, e]
                if expected > 0:
                    count = np.random.poisson(top_k * expected)
                    routed[layer, e] += count
                    by_hour[hour, layer, e] += count
        observe(routed, seen, each, half_life, state, first, use, clock, counted)
        new = counted.sum(0) - before
        hits[hour] += new[0]
        pairs[hour] += new[1]
        spent = plan_swaps(
            use, half_life, state, slots, rest_until, clock, sizes, 1.0, allowance, MARGIN,
            2 * PAYBACK_PAIRS, table,
        )  # fmt: skip
        allowance -= spent
        moved[hour] += spent
        for layer, down, up in table:
            if layer < 0:
                break
            left_at[layer, down] = clock[layer]
            swaps[hour] += 1
            if clock[layer] - left_at[layer, up] < 2 * half_life[0, layer]:
                returns[hour] += 1
        for layer in range(layers):
            if np.sum(state[layer] == HOT) != hot:
                broken += 1
    return broken


def simulate(
    server: Server, topics: int = 6, hours: int = 24, budget: float = LINK_BYTES, seed: int = 0
) -> Day:
    """A day, or so many hours, of one server."""
    shares = popularity(server, topics, seed)
    tokens = traffic(server, topics, hours * HOUR, seed)
    fast = HALF_LIFE_PAIRS * server.experts / server.top_k
    half_life = np.repeat([[fast], [SLOWER * fast]], server.layers, axis=1)
    hits, pairs, swaps, returns = np.zeros((4, hours), np.int64)
    moved = np.zeros(hours)
    by_hour = np.zeros((hours, server.layers, server.experts), np.int64)
    broken = _run(
        shares, tokens, float(server.top_k), server.hot, server.nbytes, budget, half_life, seed,
        hits, pairs, swaps, returns, moved, by_hour,
    )  # fmt: skip
    best = np.sort(by_hour, axis=2)[:, :, -server.hot :].sum((1, 2))
    return Day(
        tokens.reshape(hours, HOUR, topics).sum((1, 2)), pairs, hits, best, swaps, returns, moved,
        broken, int(by_hour.sum()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topics", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    server = Server(experts=given.experts, hot=given.experts // 4)
    day = simulate(server, given.topics, given.hours, seed=given.seed)
    print("hour   tokens  hit rate  unmoving optimum  swaps  back  copied")
    for hour in range(given.hours):
        share = day.pairs[hour] or 1
        print(
            f"{hour:4d} {day.tokens[hour]:8.0f}     {day.hits[hour] / share:.3f}"
            f"             {day.optimum[hour] / share:.3f}"
            f"  {day.swaps[hour]:5d} {day.returns[hour]:5d}  {day.moved[hour] / 1e9:.1f} GB"
        )
    total = day.pairs.sum()
    print(
        f"all: {day.hits.sum() / total:.3f} of {total} pairs hot, unmoving by the hour "
        f"{day.optimum.sum() / total:.3f}; {day.swaps.sum()} swaps, {day.returns.sum()} back"
    )


if __name__ == "__main__":
    main()
