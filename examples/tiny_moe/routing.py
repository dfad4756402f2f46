"""How a model's routers spread tokens over experts, gathered while it runs.

with RoutingStats(model) as stats:
    perplexity(model, ...)
rows = stats.rows()
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRouting:
    """Use of one layer's experts.

    Attributes:
        layer: index of the layer.
        entropy: of the experts' shares of all choices, in bits; log2(E) is perfect balance.
        relative_entropy: `entropy` / log2(E).
        token_entropy: mean over tokens of the entropy of the router's probabilities, in bits:
            how undecided the router is about one token.
        least, most: share of the choices that the least and the most used expert get; 1 / E each
            under perfect balance.
        dead: experts that were never chosen.
    """

    layer: int
    entropy: float
    relative_entropy: float
    token_entropy: float
    least: float
    most: float
    dead: int


class RoutingStats:
    """Context manager that listens to every router (`...mlp.gate`) of a Qwen3-MoE model."""

    def __init__(self, model: nn.Module) -> None:
        self._gates = [m for name, m in model.named_modules() if name.endswith(".mlp.gate")]
        if not self._gates:
            raise ValueError("the model has no module named '...mlp.gate': no routers to listen to")
        self._counts: list[Tensor | None] = [None] * len(self._gates)
        self._token_bits = [0.0] * len(self._gates)
        self._tokens = [0] * len(self._gates)

    def __enter__(self) -> RoutingStats:
        self._handles = [
            gate.register_forward_hook(lambda _m, _a, out, i=i: self._collect(i, out))
            for i, gate in enumerate(self._gates)
        ]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _collect(self, layer: int, output: tuple[Tensor, ...]) -> None:
        logits, _, chosen = output
        counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
        before = self._counts[layer]
        self._counts[layer] = counts if before is None else before + counts
        nats = torch.special.entr(logits.float().softmax(-1)).sum().item()
        self._token_bits[layer] += nats / math.log(2)
        self._tokens[layer] += logits.shape[0]

    def rows(self) -> list[LayerRouting]:
        """One row per layer, over everything that ran in the block."""
        return [self._row(layer) for layer in range(len(self._gates))]

    def _row(self, layer: int) -> LayerRouting:
        counts = self._counts[layer]
        if counts is None:
            raise ValueError("no token has passed the routers yet")
        share = counts.double() / counts.sum()
        entropy = torch.special.entr(share).sum().item() / math.log(2)
        return LayerRouting(
            layer=layer,
            entropy=entropy,
            relative_entropy=entropy / math.log2(len(counts)),
            token_entropy=self._token_bits[layer] / self._tokens[layer],
            least=share.min().item(),
            most=share.max().item(),
            dead=int((counts == 0).sum()),
        )
