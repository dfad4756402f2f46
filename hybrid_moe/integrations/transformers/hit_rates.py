"""How many of a model's calls to experts its hot ones took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.split_experts import SplitExperts


@dataclass(frozen=True)
class HitRates:
    """How many pairs of token and expert were hot experts'.

    Attributes:
        layers: index of a layer -> hot pairs, pairs in all.
    """

    layers: Mapping[int, tuple[int, int]]

    def __sub__(self, before: HitRates) -> HitRates:
        """What has come since."""
        return HitRates(
            {
                layer: (hot - before.layers[layer][0], all_ - before.layers[layer][1])
                for layer, (hot, all_) in self.layers.items()
            }
        )

    def summary(self) -> str:
        """One line."""
        hot, pairs = (sum(counts) for counts in zip(*self.layers.values(), strict=True))
        rates = [100 * hot / of for hot, of in self.layers.values() if of]
        if not rates:
            return "no expert was used"
        least, mean, most = min(rates), sum(rates) / len(rates), max(rates)
        return (
            f"hot experts took {100 * hot / pairs:.1f} % of {pairs} calls; by layer "
            f"{least:.1f} % at least, {mean:.1f} % on average, {most:.1f} % at most"
        )


def hit_rates(model: torch.nn.Module) -> HitRates | None:
    """Of everything that a model has computed so far; None where no experts are split."""
    layers = {}
    for module in model.modules():
        if isinstance(module, HybridExperts) and isinstance(module.layer, SplitExperts):
            hot, cold = module.layer.pairs
            layers[module.layer.wrapper.layer_idx] = hot, hot + cold
    return HitRates(layers) if layers else None
