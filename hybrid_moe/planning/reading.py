"""Bytes that a token reads on a machine without a GPU: what decode's speed is bound by."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.planning.kv_cache import transformers_cache
from hybrid_moe.planning.model import Model


@dataclass(frozen=True)
class TokenReads:
    """Bytes of each part that one token reads, each of them once.

    Attributes:
        experts: the routed experts that it takes, biases included.
        dense: linear layers in strips.
        torch: weights that torch computes with. Of a table that is looked up a token reads one row,
            which is not counted.
        cache: the KV cache.
    """

    experts: int
    dense: int
    torch: int
    cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.experts + self.dense + self.torch + self.cache


def token_reads(model: Model, context: int) -> TokenReads:
    """What one token of decode reads.

    Args:
        context: tokens in the cache.

    Raises:
        ValueError: the configuration lacks a size of the cache.
    """
    return TokenReads(
        experts=sum(layer.top_k * (layer.packed + layer.bias) for layer in model.layers),
        dense=model.dense.nbytes,
        torch=model.torch_read,
        cache=transformers_cache(model.config, context).per_gpu() if context else 0,
    )
