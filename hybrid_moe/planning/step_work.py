"""A model's steps as the timeline takes them: amounts of each layer, and where its experts are.

Headers say how large the parts of a model are, not of each layer: what is not an expert is divided
evenly among the layers that have it. Sums are exact, and the layers of one model are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_moe.planning.machine import CpuSpeeds
from hybrid_moe.planning.model import HotExperts, LayerExperts, Model
from hybrid_moe.schedule.layer_times import (
    LayerTimes,
    cpu_seconds,
    layer_times,
    multiplying_seconds,
    reading_seconds,
)
from hybrid_moe.schedule.layer_work import (
    ExpertCount,
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
    experts_met,
    uniform_met,
)
from hybrid_moe.schedule.machine_rates import MachineRates

SHARED, DENSE_MLP = "shared experts", "dense MLP"


@dataclass(frozen=True)
class StepWork:
    """A step of a model on a machine.

    Attributes:
        works: amounts of each layer, dense ones too.
        splits: where the routed experts of each are computed.
        rates: of the machine.
    """

    works: tuple[LayerWork, ...]
    splits: tuple[ExpertSplit, ...]
    rates: MachineRates

    def times(self) -> list[LayerTimes]:
        """Seconds of each layer's parts."""
        pairs = zip(self.works, self.splits, strict=True)
        return [layer_times(work, split, self.rates) for work, split in pairs]

    @property
    def _cold(self) -> list[tuple[ExpertWork, ExpertCount]]:
        pairs = zip(self.works, self.splits, strict=True)
        return [(work.expert, split.cpu) for work, split in pairs if work.expert is not None]

    @property
    def cold_layers(self) -> int:
        """Layers that the CPU works on."""
        return sum(count.experts > 0 for _, count in self._cold)

    @property
    def cold_nbytes(self) -> float:
        """Bytes that the CPU reads of its experts."""
        return sum(count.experts * expert.nbytes for expert, count in self._cold)

    @property
    def sent_nbytes(self) -> float:
        """Bytes of experts that are copied to the GPU."""
        pairs = zip(self.works, self.splits, strict=True)
        return sum(s.sent.experts * w.expert.nbytes for w, s in pairs if w.expert is not None)

    @property
    def cold_macs(self) -> float:
        """Multiply-accumulates of the CPU's experts."""
        return sum(count.pairs * expert.weights for expert, count in self._cold)

    @property
    def cold_seconds(self) -> float:
        """Seconds of the CPU's experts."""
        return sum(cpu_seconds(*cold, self.rates) for cold in self._cold)

    @property
    def reading(self) -> float:
        """Seconds in which the CPU reads its experts."""
        return sum(reading_seconds(*cold, self.rates) for cold in self._cold)

    @property
    def multiplying(self) -> float:
        """Seconds in which the CPU multiplies them."""
        return sum(multiplying_seconds(*cold) for cold in self._cold)


def num_layers(model: Model) -> int:
    """All layers, those without experts too."""
    count = model.config.get("num_hidden_layers")
    return count if isinstance(count, int) else len(model.layers)


def expert_work(
    layer: LayerExperts, cpu: CpuSpeeds, mac_share: float, num_gpus: int = 1
) -> ExpertWork:
    """One expert of a layer.

    Args:
        mac_share: of the peak multiply-accumulates that many tokens reach.
        num_gpus: among which an expert on the GPU is divided.
    """
    return ExpertWork(
        nbytes=layer.packed + layer.bias,
        gpu_nbytes=layer.on_gpu / num_gpus,
        weights=layer.weights,
        one_token_rate=layer.token_rate(cpu.macs),
        many_tokens_rate=layer.rate(cpu.macs) * mac_share,
    )


def split_of(layer: LayerExperts, hot: HotExperts, tokens: float) -> ExpertSplit:
    """What a batch meets of a layer's experts: as measured, or all of them equally likely."""
    if hot.use is not None:
        use, mask = hot.use[layer.layer], hot.mask(layer)
        return ExpertSplit(hot=experts_met(use, tokens, mask), cpu=experts_met(use, tokens, ~mask))

    def met(experts: int) -> ExpertCount:
        return uniform_met(experts, layer.num_experts, layer.top_k, tokens)

    return ExpertSplit(hot=met(hot.counts[layer.layer]), cpu=met(hot.cold(layer)))


def gpu_layers(
    model: Model, experts: Sequence[ExpertWork], tokens: int, cache: float, num_gpus: int
) -> tuple[LayerWork, ...]:
    """Every layer, everything but routed experts on the GPU.

    Args:
        experts: one of each layer of `model.layers`.
        tokens: of the batch.
        cache: bytes of the KV cache that a GPU reads.
        num_gpus: that share the weights.
    """
    shared, dense = (model.parts.get(part, 0) for part in (SHARED, DENSE_MLP))
    rest = model.read_per_token - model.output_layer - shared - dense
    numbers = sorted({*range(num_layers(model)), *(layer.layer for layer in model.layers)})
    found = dict(zip((layer.layer for layer in model.layers), experts, strict=True))
    # weights in the ratio of bytes: parts of a model are stored in one format, or nearly so
    flops = 2.0 * tokens * model.weights_per_token / max(1, rest + shared + dense)
    if len(found) == len(numbers):  # an MLP beside the experts of every layer
        rest, dense = rest + dense, 0

    def amount(nbytes: float, layers: int, beside: float = 0.0) -> GpuAmount:
        return GpuAmount(nbytes / layers / num_gpus + beside, flops * nbytes / layers)

    alike = amount(rest, len(numbers), cache / len(numbers))
    mlp = amount(dense, max(1, len(numbers) - len(found)))
    return tuple(
        LayerWork(n, alike, amount(shared, len(found)), found[n])
        if n in found
        else LayerWork(n, alike, mlp)
        for n in numbers
    )
