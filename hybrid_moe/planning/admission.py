"""How many requests run at a time.

With experts on the CPU every further request meets further experts: a step takes longer, and each
request gets fewer tokens a second, although all together get more. The first falls and the second
rises until the CPU has nothing left to read that it has not read, so no number is best for both.
What one request is to have at least is the bound: then as many run as leave it that. The others
wait in SGLang's queue, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrid_moe.planning.batch_step import step_seconds
from hybrid_moe.planning.plan import Plan

READING_SPEED = 5.0
"""Tokens a second of a request, where nothing else is asked for: some 230 words a minute, as fast
as people read."""

SHARE_OF_ALONE = 0.5
"""Of its speed alone that a request keeps, where that is less than `READING_SPEED`."""

MOST = 64
"""Requests that are tried."""


def requests_with(plan_of: Callable[[int], Plan], speed: float | None) -> int:
    """The most requests that may run at a time.

    Args:
        plan_of: the plan for so many. More requests take memory, and leave fewer experts on the
            GPU: none of them is faster then.
        speed: tokens a second that each request has at least; None for `READING_SPEED`, or
            `SHARE_OF_ALONE` where that is less.

    Raises:
        ValueError: a speed that one request alone does not reach.
    """
    alone = 1 / step_seconds(plan_of(1), 1)
    if speed is not None and speed > alone:
        raise ValueError(
            f"--request-speed {speed:g}: one request alone gets {alone:.1f} tokens a second"
        )
    least = min(READING_SPEED, SHARE_OF_ALONE * alone) if speed is None else speed
    low, high = 1, MOST
    while low < high:
        middle = (low + high + 1) // 2
        if 1 / step_seconds(plan_of(middle), middle) >= least:
            low = middle
        else:
            high = middle - 1
    return low


def admission_note(plan: Plan) -> str:
    """What the number of requests of a plan comes to."""
    count = plan.request.requests
    each, alone = 1 / step_seconds(plan, count), 1 / step_seconds(plan, 1)
    if count == 1:
        return f"one request runs at a time and gets {_digits(alone)} tok/s; others wait"
    return (
        f"at most {count} requests run at a time: each gets {_digits(each)} tok/s then, all "
        f"{_digits(count * each)}, and one alone {_digits(alone)}"
    )


def _digits(speed: float) -> str:
    return f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"
