"""Amounts of one layer in one step, and which of its experts are computed where.

A pair is a token and an expert that it takes. Reading an expert is paid once however many tokens
take it, multiplying for each pair: so every split has both, the experts that some token takes and
the pairs. Both may be expectations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExpertWork:
    """One routed expert of a layer.

    Attributes:
        nbytes: that the CPU reads of it, and that a copy moves.
        gpu_nbytes: that a GPU reads of it.
        weights: as many multiply-accumulates for a token.
        one_token_rate: multiply-accumulates of the CPU in a second where it has one token: as fast
            as weights are decoded.
        many_tokens_rate: the same for each further token.
    """

    nbytes: float
    gpu_nbytes: float
    weights: float
    one_token_rate: float
    many_tokens_rate: float


@dataclass(frozen=True)
class GpuAmount:
    """What a GPU does: `nbytes` that it reads, `flops` that it computes."""

    nbytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class LayerWork:
    """One layer in one step of some batch.

    Attributes:
        layer: its number, dense layers counted.
        before: until the experts of each token are known: norms, attention with its part of the
            cache, router; of a dense layer all of it.
        shared: experts that every token takes, computed beside the routed ones.
        expert: each of its routed experts; None for a dense layer.
    """

    layer: int
    before: GpuAmount
    shared: GpuAmount = GpuAmount()
    expert: ExpertWork | None = None


@dataclass(frozen=True)
class ExpertCount:
    """Experts that are met, and pairs of a token and one of them. Both may be expectations."""

    experts: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: ExpertCount) -> ExpertCount:
        return ExpertCount(self.experts + other.experts, self.pairs + other.pairs)


@dataclass(frozen=True)
class ExpertSplit:
    """Where the routed experts of a layer are computed in a step; each pair is in one of them.

    Attributes:
        hot: resident on the GPU.
        cpu: on the CPU, for this layer's sum.
        sent: on the GPU, their weights copied for this step.
        deferred: on the CPU, for the sum of the next layer with experts.
    """

    hot: ExpertCount = ExpertCount()
    cpu: ExpertCount = ExpertCount()
    sent: ExpertCount = ExpertCount()
    deferred: ExpertCount = ExpertCount()


def experts_met(
    probability: npt.ArrayLike, tokens: float, chosen: npt.ArrayLike | None = None
) -> ExpertCount:
    """What so many independent tokens meet of some experts.

    Args:
        probability: float [E], that a token takes the expert; they sum to k.
        tokens: of the batch.
        chosen: bool [E], the experts that count; None for all.
    """
    p = np.asarray(probability, dtype=np.float64)
    if chosen is not None:
        p = p[np.asarray(chosen, dtype=bool)]
    met = -np.expm1(tokens * np.log1p(-np.minimum(p, 1 - 1e-12)))
    return ExpertCount(float(met.sum()), float(tokens * p.sum()))


def uniform_met(experts: float, num_experts: int, top_k: float, tokens: float) -> ExpertCount:
    """The same where all of a layer's `num_experts` are equally likely, of `experts` of them."""
    share = top_k / num_experts
    return ExpertCount(experts * (1 - (1 - share) ** tokens), experts * share * tokens)


def uniform_deferred(
    experts: float, num_experts: int, top_k: int, tokens: float, depth: int
) -> ExpertCount:
    """What is deferred of so many of a layer's experts, all equally likely, where each token defers
    the `depth` of its `top_k` that it weights least.

    An expert is deferred where no token needs it now: with p = k / E and q = p (k - depth) / k it
    is met by none that needs it with (1 - q)^B, and by none at all with (1 - p)^B.
    """
    p = top_k / num_experts
    needed = p * max(0, top_k - depth) / top_k
    free = (1 - needed) ** tokens
    pairs = tokens * (p - needed) * (1 - needed) ** (tokens - 1)
    return ExpertCount(experts * (free - (1 - p) ** tokens), experts * pairs)
