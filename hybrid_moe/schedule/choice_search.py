"""Which experts of a layer to send and which to defer: the search, compiled.

Experts are sent in one order, those that take the CPU longest first: a copy takes as long for each,
so to swap a sent expert for one that the CPU has done sooner never helps. They are deferred in one
order, least routing weight first, since that is what deferral costs. What is left to find is how
many of each: every pair of numbers is tried. A choice is worth what the step will have taken after
this layer and the `ahead` layers behind it, which are taken to ask for what they usually do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.schedule.layer_step import compiled_advance

LEAST_GAIN = 1e-3
"""Of the time until the end of what is looked at: less than this, no expert more is deferred."""

Search = Callable[..., tuple[int, int, float]]


@cache
def compiled_search() -> Search:
    """(state [4], layer [7], costs [m, 4], send order [s], defer order [d], ahead [h, 7], their
    parts [h, 7]) -> experts sent, experts deferred, seconds of the step after all that."""
    from numba import njit

    advance = compiled_advance()

    @njit(nogil=True, cache=False)  # type: ignore[misc]
    def search(
        state: Any, layer: Any, costs: Any, send: Any, defer: Any, ahead: Any, usual: Any
    ) -> tuple[int, int, float]:
        m = costs.shape[0]
        is_sent = np.zeros(m, np.bool_)
        part = np.zeros(7)
        for e in range(m):
            part[0] += costs[e, 0]
            part[1] += costs[e, 1]
        best_sent, best_deferred, best, start = 0, 0, np.inf, state[0]
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
                after = advance(state, layer, tried)
                for h in range(len(ahead)):
                    after = advance(after, ahead[h], usual[h])
                if after[0] - start < (best - start) * (1 - LEAST_GAIN):
                    best_sent, best_deferred, best = sent, deferred, after[0]
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
        return best_sent, best_deferred, best

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
