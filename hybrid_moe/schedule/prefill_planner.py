"""How many cold experts of a long batch travel to the GPU, and how many the CPU computes.

For a layer of which n experts are sent, those with most pairs first:

    CPU   submit + cpu(the rest) + back               falls with n
    GPU   max(its own experts, the link's n) + gpu(n)  grows with n

The later of the two is the layer's time, least where they meet. What is sent ahead for the next
layer begins when the link is free, so that its arrival counts from there; a late expert for this
layer makes all of them later. Both numbers are chosen together: the sum of the two layers' times is
least. A steady state follows from that by itself: a layer whose link is behind sends less.

Seconds are those of the timeline (`layer_times`), times factors that are learned from the layers
before: of the CPU for each format, of the GPU, and of the link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, PrefillTimes, SendChoice
from hybrid_moe.schedule.layer_times import cpu_seconds, gpu_expert_seconds
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertWork
from hybrid_moe.schedule.machine_rates import MachineRates

LEARNING = 0.3
"""Weight of the latest layer in what is learned: three layers are two thirds of it."""

_TRIED = 9
"""Numbers of late experts that are tried at first, and again around the best of them."""


@dataclass
class LearnedFactor:
    """Measured over predicted seconds, an exponential mean of their logarithms."""

    value: float = 1.0
    known: bool = False

    def learn(self, ratio: float) -> None:
        """Take in a measurement; the first one stands alone."""
        weight = LEARNING if self.known else 1.0
        self.value *= (ratio / self.value) ** weight
        self.known = True


@dataclass
class PrefillPlanner:
    """Chooses how many experts are sent. See the module.

    Attributes:
        rates: of the machine; `link` is not 0.
        one_token_rate, many_tokens_rate: multiply-accumulates of the CPU, see `ExpertWork`.

    Raises:
        ValueError: there is no link.
    """

    rates: MachineRates
    one_token_rate: float
    many_tokens_rate: float
    before: float = 0.0
    """Seconds of the GPU from one layer's sum to the next one's routing."""
    cpu: dict[tuple[str, str], LearnedFactor] = field(default_factory=dict)
    gpu: LearnedFactor = field(default_factory=LearnedFactor)
    link: LearnedFactor = field(default_factory=LearnedFactor)
    _before_known: bool = False

    def __post_init__(self) -> None:
        if not self.rates.link:
            raise ValueError("streamed prefill needs a link: its rate is 0")

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

    def note(self, times: PrefillTimes) -> None:
        """See `SendPlanner.note`."""
        load, sent = times.load, times.sent
        curve = LayerCurve(self, load)
        if times.before is not None:
            weight = LEARNING if self._before_known else 1.0
            self.before += weight * (times.before - self.before)
            self._before_known = True
        if times.cpu is not None and (alone := curve.cpu_alone(sent)) > 0:
            factor = self.cpu.setdefault(load.formats, LearnedFactor())
            factor.learn(max(1e-9, times.cpu / alone))
        if times.gpu and (alone := curve.gpu_alone(sent)) > 0:
            self.gpu.learn(times.gpu / alone)

    def note_link(self, nbytes: int, seconds: float) -> None:
        """See `SendPlanner.note_link`."""
        if seconds > 0:
            self.link.learn(seconds * self.rates.link / nbytes)

    def link_seconds(self, nbytes: float) -> float:
        """Of copying so many bytes."""
        return nbytes / self.rates.link * self.link.value

    def work(self, load: PrefillLoad) -> ExpertWork:
        """One expert, in the timeline's terms."""
        return ExpertWork(
            load.nbytes, load.nbytes, load.weights, self.one_token_rate, self.many_tokens_rate
        )


class LayerCurve:
    """A layer's times over the number of experts that are sent.

    Args:
        planner: its rates, and what it has learned.
        load: of the layer.
    """

    def __init__(self, planner: PrefillPlanner, load: PrefillLoad) -> None:
        self._planner, self._load, self._work = planner, load, planner.work(load)
        # pairs of the first n experts
        self._pairs: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(load.cold)])
        known = planner.cpu.get(load.formats)
        self._cpu_factor = 1.0 if known is None else known.value

    def link(self, sent: int) -> float:
        """Seconds of the copies."""
        return self._planner.link_seconds(sent * self._load.nbytes)

    def cpu_alone(self, sent: int) -> float:
        """Predicted seconds of the CPU's experts, nothing learned and nothing handed over."""
        rest = ExpertCount(len(self._load.cold) - sent, float(self._pairs[-1] - self._pairs[sent]))
        return cpu_seconds(self._work, rest, self._planner.rates) if rest.experts else 0.0

    def gpu_alone(self, sent: int) -> float:
        """Predicted seconds of all experts of the GPU, nothing learned."""
        return self._gpu(self._load.on_gpu, 1) + self._gpu(self._of(sent), 1)

    def cpu(self, sent: int) -> float:
        """Seconds of the CPU's part."""
        alone = self.cpu_alone(sent)
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
        if not count.experts:
            return 0.0
        return factor * gpu_expert_seconds(self._work, ExpertCount(*count), self._planner.rates)
