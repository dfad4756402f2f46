"""Add up each token's experts, with their weights, in the order that the CPU adds them: `combine`.

    out[t] = bf16( sum over hot pairs (e, j) of t, ascending in e, then j: weight * y  + cold[t] )

All in float32 and unfused, as on the CPU (docs/numerics.md): the sum starts at 0, a product is
rounded before it is added, and the CPU's part comes last. The only other rounding is the output's.
"""

from __future__ import annotations

import torch

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.gpu_kernels.pack_tokens import check_routing

Tensor = torch.Tensor


def combine_ref(
    y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None = None
) -> Tensor:
    """`combine` in torch: any device, no value read by the host, bit for bit.

    Raises:
        TypeError, ValueError: see `combine`.
    """
    _check(y, ids, weights, slot_of, cold)
    (tokens, k), experts, H = ids.shape, len(slot_of), y.shape[1]
    known = (ids >= 0) & (ids < experts)
    hot = known & (slot_of[ids.long().clamp(0, experts - 1)] >= 0)
    # Stable: of equal ids the smaller j comes first. What does not count comes last.
    order = torch.where(hot, ids.long(), experts).sort(dim=1, stable=True).indices
    first_pair = torch.arange(tokens, device=y.device) * k
    total = torch.zeros(tokens, H, dtype=torch.float32, device=y.device)
    for place in range(k):
        j = order[:, place : place + 1]
        part = weights.gather(1, j) * y[first_pair + j[:, 0]]  # rounded: not fused with the sum
        # Rows of pairs that do not count were never written, and may be NaN.
        total = torch.where(hot.gather(1, j), total + part, total)
    return (total if cold is None else total + cold).to(torch.bfloat16)


def _check(y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None) -> None:
    tokens = ids.shape[0] if ids.dim() else 0
    check_routing(ids, slot_of, tokens, y.device)
    pairs = ids.numel()
    if y.dim() != 2 or y.shape[0] != pairs or y.shape[1] % GROUP or not y.shape[1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, must be ({pairs}, H), a row for each of ids, H a "
            f"positive multiple of {GROUP}"
        )
    shapes = {"y": (y, y.shape), "weights": (weights, ids.shape)}
    if cold is not None:
        shapes["cold"] = (cold, torch.Size((tokens, y.shape[1])))
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, must be torch.float32")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")
        if tensor.device != y.device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {y.device} like y")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")


def combine(
    y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None = None
) -> Tensor:
    """Add up the hot experts of each token and the CPU's part: bf16 [T, H].

    Args:
        y: float32 [T * k, H], H a multiple of 32: the row of each pair, not yet weighted. Rows of
            pairs whose expert has no slot are not read.
        ids: int32 or int64 [T, k], k up to 16.
        weights: float32 [T, k].
        slot_of: int32 [E]: the slot of each expert, -1 if it has none.
        cold: float32 [T, H], the sum of the other experts, or None.

    All tensors are contiguous and on one device.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    return combine_ref(y, ids, weights, slot_of, cold)
