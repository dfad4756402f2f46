"""Rates of a machine, and what layers that are over have said about them.

Seconds are those of the timeline (`layer_times`), times factors that are learned: of the CPU for
each format, of the GPU, and of the link. A planner is that and a choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid_moe.runtime.prefill_loads import PairCount, PrefillLoad, PrefillTimes
from hybrid_moe.schedule.layer_times import cpu_seconds, gpu_expert_seconds
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertWork
from hybrid_moe.schedule.machine_rates import MachineRates

LEARNING = 0.3
"""Weight of the latest layer in what is learned: three layers are two thirds of it."""


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
class LearnedRates:
    """See the module.

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
            raise ValueError("sending experts needs a link: its rate is 0")

    def note(self, times: PrefillTimes) -> None:
        """See `SendPlanner.note`."""
        load, sent = times.load, times.sent
        travel, rest = load.split(sent)
        if times.before is not None:
            weight = LEARNING if self._before_known else 1.0
            self.before += weight * (times.before - self.before)
            self._before_known = True
        if times.cpu is not None and (alone := self.cpu_alone(load, rest)) > 0:
            factor = self.cpu.setdefault(load.formats, LearnedFactor())
            factor.learn(max(1e-9, times.cpu / alone))
        alone = self.gpu_alone(load, load.on_gpu) + self.gpu_alone(load, travel)
        if times.gpu and alone > 0:
            self.gpu.learn(times.gpu / alone)

    def note_link(self, nbytes: int, seconds: float) -> None:
        """See `SendPlanner.note_link`."""
        if seconds > 0:
            self.link.learn(seconds * self.rates.link / nbytes)

    def cpu_factor(self, formats: tuple[str, str]) -> float:
        """Of the CPU for experts of these formats; 1 where nothing is known."""
        known = self.cpu.get(formats)
        return 1.0 if known is None else known.value

    def link_seconds(self, nbytes: float) -> float:
        """Of copying so many bytes."""
        return nbytes / self.rates.link * self.link.value

    def cpu_alone(self, load: PrefillLoad, count: PairCount) -> float:
        """Predicted seconds of so many experts on the CPU, nothing learned and nothing handed
        over."""
        if not count.experts:
            return 0.0
        return cpu_seconds(self.work(load), ExpertCount(*count), self.rates)

    def gpu_alone(self, load: PrefillLoad, count: PairCount) -> float:
        """Predicted seconds of so many experts on the GPU, nothing learned."""
        if not count.experts:
            return 0.0
        return gpu_expert_seconds(self.work(load), ExpertCount(*count), self.rates)

    def work(self, load: PrefillLoad) -> ExpertWork:
        """One expert, in the timeline's terms."""
        return ExpertWork(
            load.nbytes, load.nbytes, load.weights, self.one_token_rate, self.many_tokens_rate
        )
