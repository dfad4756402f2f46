"""The shortest step that any choices give, the routing of all layers known: what decisions are
measured against.

Experts that as many tokens take and that may both be deferred, or both not, are interchangeable: a
choice is how many of each kind are sent and deferred. After a layer, only four times matter
(`layer_step`), and none is ever better for being later. So of all states that some choices lead to,
those that another one is nowhere behind are forgotten; what is left in the end holds the optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from hybrid_moe.schedule.layer_demand import LayerDemand
from hybrid_moe.schedule.layer_step import Floats, compiled_advance, constants_of, costs_of, loop
from hybrid_moe.schedule.layer_work import LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

MOST_PARTS = 200_000
"""Choices of one layer: more are refused, before they are made."""


def shortest_step(
    works: Sequence[LayerWork],
    demands: Sequence[LayerDemand],
    rates: MachineRates,
    *,
    send: bool = True,
    defer: bool = True,
) -> float:
    """Seconds of the best step.

    Args:
        works, demands: of each layer with experts, in order.
        rates: of the machine.
        send: experts may be sent, where there is a link.
        defer: those that `demands` call deferrable may be deferred, but for the last layer's.

    Raises:
        ValueError: a layer has more choices than `MOST_PARTS`.
    """
    extend = _compiled_extend()
    states = np.zeros((1, 4))
    for place, (work, demand) in enumerate(zip(works, demands, strict=True)):
        last = place == len(works) - 1
        parts = parts_of(
            work, demand, rates, send=send and rates.link > 0, defer=defer and not last
        )
        kept, count = extend(states, constants_of(work, demand, rates), parts)
        states = kept[:count]
    return float(states[:, 0].min())


def parts_of(
    work: LayerWork, demand: LayerDemand, rates: MachineRates, *, send: bool, defer: bool
) -> Floats:
    """[n, 7]: every part (see `layer_step`) that differs for the model."""
    kinds: dict[tuple[int, bool], int] = {}
    for tokens, deferrable in zip(demand.tokens.tolist(), demand.deferrable.tolist(), strict=True):
        kind = (tokens, deferrable and defer)
        kinds[kind] = kinds.get(kind, 0) + 1
    tokens = np.array([kind[0] for kind in kinds], np.float64)
    costs = costs_of(work, tokens, rates)
    each = [
        [
            (sent, later)
            for sent in range(count + 1 if send else 1)
            for later in range(count - sent + 1 if deferrable else 1)
        ]
        for (_, deferrable), count in kinds.items()
    ]
    number = int(np.prod([len(choices) for choices in each], dtype=np.float64)) if each else 1
    if number > MOST_PARTS:
        raise ValueError(
            f"layer {work.layer} has {number} choices, more than {MOST_PARTS}: fewer tokens at once"
        )
    # [n, kinds, 2]: how many of each kind are sent, and deferred
    chosen = np.array(list(itertools.product(*each)), np.float64).reshape(number, len(each), 2)
    counts = np.array(list(kinds.values()), np.float64)
    sent, later = chosen[..., 0], chosen[..., 1]
    now = counts - sent - later
    return np.column_stack(
        [now @ costs[:, :2], later @ costs[:, :2], sent.sum(1), sent @ costs[:, 2:]]
    )


@cache
def _compiled_extend() -> Callable[[Floats, Floats, Floats], tuple[Floats, int]]:
    """(states [s, 4], layer [7], parts [n, 7]) -> the states after it that matter, in the first so
    many rows."""
    advance = compiled_advance()

    @loop
    def extend(states: Floats, layer: Floats, parts: Floats) -> tuple[Floats, int]:
        kept = np.empty((64, 4))
        count = 0
        for s in range(len(states)):
            state = (states[s, 0], states[s, 1], states[s, 2], states[s, 3])
            for p in range(len(parts)):
                end, cpu, link, carried = advance(state, layer, parts[p])
                cpu, link = max(cpu, end), max(link, end)  # times that have passed are all alike
                worse = False
                for k in range(count):
                    if (
                        kept[k, 0] <= end
                        and kept[k, 1] <= cpu
                        and kept[k, 2] <= link
                        and kept[k, 3] <= carried
                    ):
                        worse = True
                        break
                if worse:
                    continue
                place = 0
                for k in range(count):  # those that the new one is nowhere behind go
                    if (
                        kept[k, 0] < end
                        or kept[k, 1] < cpu
                        or kept[k, 2] < link
                        or kept[k, 3] < carried
                    ):
                        for column in range(4):
                            kept[place, column] = kept[k, column]
                        place += 1
                count = place
                if count == len(kept):
                    more = np.empty((2 * count, 4))
                    for k in range(count):
                        for column in range(4):
                            more[k, column] = kept[k, column]
                    kept = more
                kept[count, 0], kept[count, 1] = end, cpu
                kept[count, 2], kept[count, 3] = link, carried
                count += 1
        return kept, count

    return extend
