"""Experts whose weights are their signature: an output says which experts made it, exactly.

For x with 1 in column 0, expert e's gate and up give h = 2 in column e and 0 elsewhere, and its
down projection turns that into 1 in the rows r with r % E == e. Gate and up of one expert with down
of another would give 2 in all rows. So out[t, r] is the sum of the routing weights of expert r % E.
Every number on the way is exact in MXFP4 and bf16, and a pair that is lost, counted twice, or
computed with bytes of another expert shows.
"""

from __future__ import annotations

import torch

from tests.hybrid_moe.cases import Batch, E, H, I, K, Weights


def signature_weights() -> Weights:
    """Of E experts."""
    gate, up = torch.zeros(E, I, H), torch.zeros(E, I, H)
    down = torch.ones(E, H, I)
    for e in range(E):
        gate[e, e, 0], up[e, e, 0] = 32, 1 / 16  # the sigmoid of 32 is 1 in float32
        down[e, :, e] = (torch.arange(H) % E == e) / 2
    return Weights(gate, up, down)


def signature_batch(tokens: int, seed: int) -> Batch:
    """Ids in and out of range, weights 1, 2, 4, ..."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(tokens, H, dtype=torch.bfloat16)
    hidden[:, 0] = 1
    ids = torch.rand(tokens, E + 1, generator=rng).argsort(dim=1)[:, :K] - 1
    return Batch(hidden, ids, (2.0 ** torch.arange(K)).repeat(tokens, 1))


def signatures(batch: Batch, only: torch.Tensor | None = None) -> torch.Tensor:
    """What the layer must return: bf16 [T, H]. `only`: the experts of bool [E]."""
    weight = torch.zeros(len(batch.ids), E)
    for e in range(E):
        if only is None or only[e]:
            weight[:, e] = (batch.weights * (batch.ids == e)).sum(1)
    return weight.repeat(1, H // E).to(torch.bfloat16)
