"""Seconds of each part of a layer: amounts over rates.

    CPU       max(bytes / read, weights / one_token_rate + (pairs - experts) x weights / many_rate)
    GPU       max(bytes / read, flops / flops)
    link      latency + bytes / link

The threads of the CPU work on all experts of a layer at once, one reading while another multiplies:
so the larger of the two sums counts, not the sum of the larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.schedule.layer_work import (
    ExpertCount,
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
)
from hybrid_moe.schedule.machine_rates import MachineRates


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's parts, none of them waiting for another.

    Attributes:
        layer: its number.
        before: GPU, until the routing is known.
        beside: GPU, shared and resident experts.
        link: copies of the experts that are sent.
        sent: GPU, these experts once they have arrived.
        submit: hand-over to the CPU; 0 where it gets nothing.
        cpu: the CPU's experts of this layer's sum.
        deferred: the CPU's experts of the next sum.
        back: hand-over from the CPU; 0 where it got nothing.
        routed: it has routed experts, and so adds what the one before it deferred.
    """

    layer: int
    before: float = 0.0
    beside: float = 0.0
    link: float = 0.0
    sent: float = 0.0
    submit: float = 0.0
    cpu: float = 0.0
    deferred: float = 0.0
    back: float = 0.0
    routed: bool = True

    @property
    def alone(self) -> float:
        """Seconds of the layer where none is beside it: it waits for the slowest of CPU, GPU and
        link. What it defers is taken to be done under the next layer."""
        cpu = self.submit + self.cpu + self.back if self.cpu else 0.0
        gpu = max(self.beside, self.link) + self.sent if self.link else self.beside + self.sent
        return self.before + max(cpu, gpu)


def reading_seconds(expert: ExpertWork, count: ExpertCount, rates: MachineRates) -> float:
    """In which the CPU reads so many experts."""
    return count.experts * expert.nbytes / rates.cpu_read


def multiplying_seconds(expert: ExpertWork, count: ExpertCount) -> float:
    """In which the CPU computes so many experts. The first token of each pays for decoding its
    weights."""
    further = max(0.0, count.pairs - count.experts) / expert.many_tokens_rate
    return expert.weights * (count.experts / expert.one_token_rate + further)


def cpu_seconds(expert: ExpertWork, count: ExpertCount, rates: MachineRates) -> float:
    """Of so many experts on the CPU."""
    return max(reading_seconds(expert, count, rates), multiplying_seconds(expert, count))


def gpu_seconds(amount: GpuAmount, rates: MachineRates) -> float:
    """Of anything on the GPU."""
    return max(amount.nbytes / rates.gpu_read, amount.flops / rates.gpu_flops)


def gpu_expert_seconds(expert: ExpertWork, count: ExpertCount, rates: MachineRates) -> float:
    """Of so many experts on the GPU."""
    amount = GpuAmount(count.experts * expert.gpu_nbytes, 2 * count.pairs * expert.weights)
    return gpu_seconds(amount, rates)


def link_seconds(expert: ExpertWork, experts: float, rates: MachineRates) -> float:
    """Of copying so many experts to the GPU.

    Raises:
        ValueError: there is no link.
    """
    if not experts:
        return 0.0
    if not rates.link:
        raise ValueError("experts cannot be sent: the rate of the link is 0")
    return rates.transfer + experts * expert.nbytes / rates.link


def stretched(cpu: float, link: float, rates: MachineRates) -> float:
    """Seconds of CPU work that takes `cpu` alone, beside copies that take `link` seconds. While
    they run, the CPU has what they leave of the memory's bandwidth, and never less than half."""
    left = max(rates.memory - rates.link, rates.memory / 2) / rates.cpu_read
    if not link or left >= 1:
        return cpu
    return min(cpu / left, cpu + (1 - left) * link)


def layer_times(work: LayerWork, split: ExpertSplit, rates: MachineRates) -> LayerTimes:
    """The parts of `work` where its experts are split so.

    Raises:
        ValueError: experts of a layer that has none, or experts are sent where there is no link.
    """
    before = rates.launch + gpu_seconds(work.before, rates)
    if work.expert is None:
        if split != ExpertSplit():
            raise ValueError(f"layer {work.layer} has no experts that could be computed: {split}")
        shared = gpu_seconds(work.shared, rates)
        return LayerTimes(work.layer, before, shared, routed=False)
    expert = work.expert
    link = link_seconds(expert, split.sent.experts, rates)
    now, later = (cpu_seconds(expert, count, rates) for count in (split.cpu, split.deferred))
    cpu = stretched(now, link, rates)
    on_cpu = split.cpu.experts + split.deferred.experts > 0
    return LayerTimes(
        layer=work.layer,
        before=before,
        beside=gpu_seconds(work.shared, rates) + gpu_expert_seconds(expert, split.hot, rates),
        link=link,
        sent=gpu_expert_seconds(expert, split.sent, rates),
        submit=rates.submit if on_cpu else 0.0,
        cpu=cpu,
        deferred=stretched(now + later, link, rates) - cpu,
        back=rates.back if on_cpu else 0.0,
    )
