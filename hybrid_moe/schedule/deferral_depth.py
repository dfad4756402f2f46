"""How many experts of each token to defer: a number for a batch size, since a captured graph keeps
it.

Deferred experts fill the time in which the CPU would wait for attention. More than fill it make the
step no shorter, and every one changes the result a little: so the smallest number is taken that is
within `LEAST_GAIN` of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybrid_moe.schedule.layer_times import LayerTimes
from hybrid_moe.schedule.timeline import run_step

LEAST_GAIN = 0.01


@dataclass(frozen=True)
class DepthChoice:
    """Attributes:
    depth: experts of a token that are deferred.
    seconds: of a step with 0, 1, ... deferred.
    """

    depth: int
    seconds: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Of the chosen depth over none."""
        return self.seconds[0] / self.seconds[self.depth]


def choose_depth(
    times_at: Callable[[int], Sequence[LayerTimes]], most: int, *, after: float = 0.0
) -> DepthChoice:
    """The depth for a batch.

    Args:
        times_at: depth -> the layers' times; the last layer with experts defers none.
        most: the largest depth that quality allows.
        after: seconds behind the last layer.

    Raises:
        ValueError: a negative `most`.
    """
    if most < 0:
        raise ValueError(f"most is {most}, must be 0 or more")
    seconds = tuple(run_step(times_at(depth), after=after).seconds for depth in range(most + 1))
    best = min(seconds)
    depth = next(d for d, s in enumerate(seconds) if s <= best * (1 + LEAST_GAIN))
    return DepthChoice(depth, seconds)
