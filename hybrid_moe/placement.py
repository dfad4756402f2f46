"""Which experts live on the GPU.

The most used experts of the whole model, wherever they are: a layer whose routing is skewed gets
more of them than a layer that spreads its tokens.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch

from hybrid_moe.arguments import integer


def generate_gpu_experts_masks(activation_freq: Any, num_gpu_experts: int) -> torch.Tensor:
    """The `num_gpu_experts` most used experts of a model.

    Args:
        activation_freq: [L, E] tensor (or nested sequence) of any numeric dtype, strides and
            device: how often each expert of each layer was chosen.
        num_gpu_experts: experts on the GPU in all layers together; more than L x E means all.

    Returns:
        bool [L, E] on the CPU, True for an expert on the GPU. Equal frequencies at the threshold
        go one by one to the layer that has the fewest GPU experts (then the lowest layer, then the
        lowest id), so that no layer is favoured by its place.

    Raises:
        TypeError: `num_gpu_experts` is not an integer, or the frequencies are complex.
        ValueError: not two dimensions, a NaN, or a negative `num_gpu_experts`.
    """
    freq = torch.as_tensor(activation_freq)
    if freq.is_complex():
        raise TypeError(f"activation_freq must be real, not {freq.dtype}")
    if freq.dim() != 2:
        raise ValueError(
            f"activation_freq has shape {tuple(freq.shape)}, must be [layers, experts]"
        )
    freq = freq.detach().to("cpu", torch.float64)
    if bool(freq.isnan().any()):
        layer, expert = freq.isnan().nonzero()[0].tolist()
        raise ValueError(f"activation_freq[{layer}, {expert}] is NaN, must be a frequency")
    total = integer("num_gpu_experts", num_gpu_experts)
    if total < 0:
        raise ValueError(f"num_gpu_experts is {total}, must be 0 or more")
    total = min(total, freq.numel())
    if total == 0:
        return torch.zeros(freq.shape, dtype=torch.bool)

    threshold = freq.flatten().topk(total).values[-1]
    mask = freq > threshold
    _share_ties(mask, freq == threshold, total - int(mask.sum()))
    return mask


def _share_ties(mask: torch.Tensor, tied: torch.Tensor, count: int) -> None:
    """Set `count` of the `tied` places in `mask`, each in the layer with the fewest set so far."""
    places = [row.nonzero().flatten().tolist() for row in tied]
    queue = [(int(mask[layer].sum()), layer) for layer in range(len(places)) if places[layer]]
    heapq.heapify(queue)
    for _ in range(count):
        resident, layer = heapq.heappop(queue)
        mask[layer, places[layer].pop(0)] = True
        if places[layer]:
            heapq.heappush(queue, (resident + 1, layer))
