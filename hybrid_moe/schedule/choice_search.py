"""Which experts of a layer to send and which to defer: the search, compiled.

Experts are sent in one order, those that take the CPU longest first: a copy takes as long for each,
so to swap a sent expert for one that the CPU has done sooner never helps. They are deferred in one
order, least routing weight first, since that is what deferral costs. What is left to find is how
many of each: every pair of numbers is tried.

A choice is worth what the step will have taken after this layer and the layers that are looked at
behind it. Their routing is not known: they are taken to meet as many experts as in one of the last
steps, and what a choice is worth is the mean over these. The first layer behind may adapt: it sends
and defers one more or less than it did then, whatever is best. If it could not, choices would look
bad that only ask the next layer to go along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.schedule.layer_step import compiled_advance, loop

LEAST_GAIN = 1e-3
"""Of the time until the end of what is looked at: less than this, no expert more is deferred."""

COUNT, DEFERRABLE, WAS_SENT, WAS_DEFERRED = range(4)
"""Places in what a layer asked for, before the four costs of a mean expert: cold experts that were
met, those of them that could be deferred, and how many were sent and deferred."""

Search = Callable[..., tuple[int, int, float, float]]


@cache
def compiled_search() -> Search:
    """(state, layer [7], costs [m, 4], send order [s], defer order [d], layers behind in some
    steps [n, h, 7], what they asked for [n, h, 8], whether they may send) -> experts sent, experts
    deferred, mean seconds of the step after all that, and where none is sent or deferred."""
    advance = compiled_advance()

    @loop
    def part_of(asked: Any, sent: float, deferred: float) -> Any:
        part = np.empty(7)
        now = asked[0] - sent - deferred
        part[0], part[1] = now * asked[4], now * asked[5]
        part[2], part[3] = deferred * asked[4], deferred * asked[5]
        part[4], part[5], part[6] = sent, sent * asked[6], sent * asked[7]
        return part

    @loop
    def worth(after: Any, ahead: Any, asked: Any, can_send: bool) -> float:
        """When the layers behind are over, the first of them adapting."""
        if ahead.shape[1] == 0:
            return float(after[0])
        total = 0.0
        for step in range(len(ahead)):
            best, first = np.inf, asked[step, 0]
            for sent in range(max(0, int(first[2]) - 1), int(first[2]) + 2):
                if sent > first[0] or (sent > 0 and not can_send):
                    continue
                for deferred in range(max(0, int(first[3]) - 1), int(first[3]) + 2):
                    if deferred > first[1] or sent + deferred > first[0]:
                        continue
                    state = advance(after, ahead[step, 0], part_of(first, sent, deferred))
                    for h in range(1, ahead.shape[1]):
                        row = asked[step, h]
                        state = advance(state, ahead[step, h], part_of(row, row[2], row[3]))
                    best = min(best, state[0])
            total += best
        return total / len(ahead)

    @loop
    def search(
        state: Any, layer: Any, costs: Any, send: Any, defer: Any, ahead: Any, asked: Any,
        can_send: bool,
    ) -> tuple[int, int, float, float]:  # fmt: skip
        m = costs.shape[0]
        is_sent = np.zeros(m, np.bool_)
        part = np.zeros(7)
        for e in range(m):
            part[0] += costs[e, 0]
            part[1] += costs[e, 1]
        best_sent, best_deferred, best, start = 0, 0, np.inf, state[0]
        plain = np.inf
        for sent in range(len(send) + 1):
            if sent:
                e = send[sent - 1]
                is_sent[e] = True
                part[0] -= costs[e, 0]
                part[1] -= costs[e, 1]
                part[4] += 1
                part[5] += costs[e, 2]
                part[6] += costs[e, 3]
            tried = part.copy()
            deferred, place = 0, 0
            while True:
                if sent + deferred == m:  # what is left of the sums is rounding
                    tried[0] = tried[1] = 0.0
                found = worth(advance(state, layer, tried), ahead, asked, can_send)
                if sent + deferred == 0:
                    plain = found
                if found - start < (best - start) * (1 - LEAST_GAIN):
                    best_sent, best_deferred, best = sent, deferred, found
                while place < len(defer) and is_sent[defer[place]]:
                    place += 1
                if place == len(defer):
                    break
                e = defer[place]
                place += 1
                deferred += 1
                tried[0] -= costs[e, 0]
                tried[1] -= costs[e, 1]
                tried[2] += costs[e, 0]
                tried[3] += costs[e, 1]
        return best_sent, best_deferred, best, plain

    found: Search = search
    return found


def orders(
    costs: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    deferrable: npt.NDArray[np.bool_],
    *,
    can_send: bool,
    can_defer: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the experts in the order in which they are sent, and deferred; empty where that is
    not possible. Of equal ones the earlier id first."""
    none = np.zeros(0, np.int64)
    send = np.argsort(-costs[:, :2].max(1), kind="stable") if can_send else none
    if not can_defer:
        return send, none
    places = np.flatnonzero(deferrable)
    return send, places[np.argsort(weight[places], kind="stable")]
