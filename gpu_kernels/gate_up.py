"""The first grouped GEMM with its activation: `gate_up`.

    g = W_gate x + b_gate      u = W_up x + b_up            float32
    h = bf16(SwiGLU(g, u))                                  its clamp, alpha and offset: Activation

for every pair of the tiles; h is written in the `k_order` of `down`, whose input it is.
"""

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.strips import GROUP
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles, check_tensor
from hybrid_moe.gpu_kernels.fragments import permute, unpermute
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor


def _check(layout: SlotLayout, tiles: ExpertTiles, xp: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    check_tensor("xp", xp, torch.bfloat16, (xp.shape[0], layout.hidden), xp.device)
    tiles.check(layout, 3, layout.intermediate // GROUP, xp)


def gate_up_ref(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    """`gate_up` in torch: float32, any device. Rows of pairs in no tile are zero."""
    _check(layout, tiles, xp, k)
    limit, alpha, offset = activation.parameters
    x = unpermute(xp, layout.fmt).float()
    h = xp.new_zeros(xp.shape[0] * k, layout.intermediate)
    for pairs, weights in tiles.pairs_by_slot(layout):
        tokens = x[pairs // k]
        g, u = tokens @ weights.gate.T, tokens @ weights.up.T
        if weights.gate_bias is not None and weights.up_bias is not None:
            g, u = g + weights.gate_bias, u + weights.up_bias
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        h[pairs] = (g * torch.sigmoid(alpha * g) * (u + offset)).to(h.dtype)
    return permute(h, layout.fmt)


def gate_up(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    """Gate, up and activation of every pair: h, bf16 [T * k, I], in `down`'s `k_order`. Rows of
    pairs in no tile are undefined.

    Args:
        layout: of a slot.
        activation: its limit and alpha are compiled in.
        tiles: from `pack`, with `gate_up_table`.
        xp: bf16 [T, H] in `k_order`.
        k: experts of a token, so that pair p reads row p // k.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    return gate_up_ref(layout, activation, tiles, xp, k)
