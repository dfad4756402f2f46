"""The second grouped GEMM: `down`.

y = W_down h + b_down        float32, a row for each pair of the tiles; not yet weighted
"""

import torch

from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles, check_tensor
from hybrid_moe.gpu_kernels.fragments import unpermute
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor


def _check(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> None:
    check_tensor("h", h, torch.bfloat16, (h.shape[0], layout.intermediate), h.device)
    tiles.check(layout, 2, -(-layout.hidden // STRIP_ROWS), h)


def down_ref(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    """`down` in torch: float32, any device. Rows of pairs in no tile are zero."""
    _check(layout, tiles, h)
    inputs = unpermute(h, layout.fmt).float()
    y = h.new_zeros(h.shape[0], layout.hidden, dtype=torch.float32)
    for pairs, weights in tiles.pairs_by_slot(layout):
        y[pairs] = inputs[pairs] @ weights.down.T
        if weights.down_bias is not None:
            y[pairs] += weights.down_bias
    return y


def down(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    """The down projection of every pair: y, float32 [T * k, H], not yet weighted. Rows of pairs in
    no tile are undefined.

    Args:
        layout: of a slot.
        tiles: from `pack`, with `down_table`.
        h: bf16 [T * k, I] in `k_order`, from `gate_up`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    return down_ref(layout, tiles, h)
