"""How many cold experts of a long batch travel to the GPU, and how many the CPU computes.

For a layer of which n experts are sent, those with most pairs first:

    CPU   submit + cpu(the rest) + back               falls with n
    GPU   max(its own experts, the link's n) + gpu(n)  grows with n

The later of the two is the layer's time, least where they meet. What is sent ahead for the next
layer begins when the link is free, so that its arrival counts from there; a late expert for this
layer makes all of them later. Both numbers are chosen together: the sum of the two layers' times is
least. A steady state follows from that by itself: a layer whose link is behind sends less.

Seconds are those of `learned_rates`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, SendChoice
from hybrid_moe.schedule.learned_rates import LearnedRates

_TRIED = 9
"""Numbers of late experts that are tried at first, and again around the best of them."""


class PrefillPlanner(LearnedRates):
    """Chooses how many experts are sent. See the module."""

    def choose(self, now: PrefillLoad, following: PrefillLoad | None, queued: float) -> SendChoice:
        """See `SendPlanner.choose`."""
        this = LayerCurve(self, now)
        then = None if following is None else LayerCurve(self, following)
        behind = self.link_seconds(queued)
        most = min(len(now.cold), now.room)

        def total(late: int) -> tuple[float, int]:
            """Seconds of both layers, and how many go ahead."""
            end = this.end(late, behind)
            if then is None:
                return end, 0
            arrival = behind + this.link(late) - end - self.before
            ahead = then.best(arrival, now.room - late)
            return end + then.end(ahead, arrival), ahead

        tried: dict[int, tuple[float, int]] = {}
        low, high = 0, most
        while True:
            for late in np.unique(np.linspace(low, high, _TRIED).astype(int)).tolist():
                if late not in tried:
                    tried[late] = total(late)
            best = min(tried, key=lambda late: (tried[late][0], late))
            step = -(-(high - low) // (_TRIED - 1))
            if step <= 1:
                why = {
                    "CPU": this.cpu(best),
                    "GPU": this.other(best, behind),
                    "link was behind": behind,
                }
                return SendChoice(best, tried[best][1], why)
            low, high = max(0, best - step), min(most, best + step)


class LayerCurve:
    """A layer's times over the number of experts that are sent.

    Args:
        planner: its rates, and what it has learned.
        load: of the layer.
    """

    def __init__(self, planner: LearnedRates, load: PrefillLoad) -> None:
        self._planner, self._load = planner, load
        # pairs of the first n experts
        self._pairs: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(load.cold)])
        self._cpu_factor = planner.cpu_factor(load.formats)

    def link(self, sent: int) -> float:
        """Seconds of the copies."""
        return self._planner.link_seconds(sent * self._load.nbytes)

    def cpu(self, sent: int) -> float:
        """Seconds of the CPU's part."""
        rest = PairCount(len(self._load.cold) - sent, float(self._pairs[-1] - self._pairs[sent]))
        alone = self._planner.cpu_alone(self._load, rest)
        if not alone:
            return 0.0
        rates = self._planner.rates
        return rates.submit + alone * self._cpu_factor + rates.back

    def other(self, sent: int, behind: float) -> float:
        """Seconds of the GPU's part, where the link is free in `behind` seconds."""
        factor = self._planner.gpu.value
        here = self._gpu(self._load.on_gpu, factor)
        return max(here, behind + self.link(sent)) + self._gpu(self._of(sent), factor)

    def end(self, sent: int, behind: float) -> float:
        """Seconds until both parts are there."""
        return max(self.cpu(sent), self.other(sent, behind))

    def best(self, behind: float, room: int) -> int:
        """The number to send, `room` at most, for which `end` is least: one part falls with it, the
        other grows."""
        low, high = 0, min(len(self._load.cold), self._load.room, room)
        while low < high:  # the first number at which the GPU's part is the later one
            middle = (low + high) // 2
            if self.other(middle, behind) >= self.cpu(middle):
                high = middle
            else:
                low = middle + 1
        if low and self.end(low - 1, behind) <= self.end(low, behind):
            return low - 1
        return low

    def _of(self, sent: int) -> PairCount:
        return PairCount(sent, float(self._pairs[sent]))

    def _gpu(self, count: PairCount, factor: float) -> float:
        return factor * self._planner.gpu_alone(self._load, count)
