"""Block-diagonal linear layers (DeepSeek-V4's output projection): one packed layer for each block.

Such a layer is a subclass of `nn.Linear` that multiplies by its weight in its own way, so what it
computes is proved rather than read from its name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear


def groups_of(linear: nn.Linear) -> int:
    """The number of blocks where `linear` multiplies x [..., G, K] block by block to [..., G, N],
    with the blocks one behind the other in its weight [G N, K]; 0 where it does not.

    Its own `forward` is run on small integers, which are added exactly in any order.
    """
    groups = getattr(linear, "n_groups", None)
    if type(linear) is nn.Linear or not isinstance(groups, int) or groups < 2:
        return 0
    if linear._parameters.get("bias") is not None or linear.out_features % groups:
        return 0
    N, K = 3, 5
    weight = (torch.arange(groups * N * K, device="cpu") % 7 - 3.0).reshape(groups * N, K)
    x = (torch.arange(2 * groups * K, device="cpu") % 5 - 2.0).reshape(1, 2, groups, K)
    stand_in = copy.copy(linear)
    parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    stand_in.__dict__["_parameters"] = parameters
    try:
        with torch.no_grad():
            result = type(linear).forward(stand_in, x)
    except Exception:  # whatever a foreign `forward` raises on other sizes: it is another layer
        return 0
    expected = torch.einsum("btgk,gnk->btgn", x, weight.view(groups, N, K))
    return groups if result.shape == expected.shape and torch.equal(result, expected) else 0


class HybridGroupedLinear(nn.Module):
    """A block-diagonal linear layer without bias, packed for the CPU. It has no parameters.

    Attributes:
        blocks: a layer for each block, of the same sizes.
    """

    def __init__(self, blocks: Iterable[HybridLinear]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., G, K] -> [..., G, N]."""
        return torch.stack([block(x[..., g, :]) for g, block in enumerate(self.blocks)], dim=-2)
