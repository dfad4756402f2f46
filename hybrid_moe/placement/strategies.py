"""Which experts live on the GPU.

`generate_gpu_experts_masks` takes the most used experts of the whole model, wherever they are: a
layer whose routing is skewed gets more of them than a layer that spreads its tokens.
`place_experts` has that and the strategies that need no statistics, for models with dense layers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from hybrid_moe.runtime.arguments import integer

RANDOM_SEED = 42
"""sglang-kt's: the same command places the same experts there and here."""

Strategy = Callable[[int, int, int], torch.Tensor]
"""(MoE layers L, experts E, experts on the GPU in all) -> bool [L, E]."""


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


def place_experts(
    strategy: str,
    num_layers: int,
    num_experts: int,
    num_gpu_experts: int,
    *,
    first_k_dense_replace: int = 0,
    moe_layer_freq: int = 1,
    activation_freq: Any = None,
) -> torch.Tensor:
    """Masks of a whole model by a strategy of `STRATEGIES` or by "frequency".

    | strategy | the GPU gets |
    |---|---|
    | uniform | the first ids of every MoE layer, as many in each (the first layers one more) |
    | front-loading | whole MoE layers from the first on |
    | random | any experts, the same at each call |
    | frequency | the most used experts, see `generate_gpu_experts_masks` |

    Strategy cost, which needs sizes and speeds, is `hybrid_moe.placement.cost_placement`.

    Args:
        strategy: its name.
        num_layers: layers of the model, dense ones counted.
        num_experts: routed experts E of each MoE layer.
        num_gpu_experts: experts on the GPU in all MoE layers together; more than there are means
            all of them.
        first_k_dense_replace: the first so many layers are dense.
        moe_layer_freq: of the others those are MoE layers whose index is a multiple of this.
        activation_freq: [num_layers, E], needed by "frequency" and by nothing else.

    Returns:
        bool [num_layers, E] on the CPU. Rows of dense layers, which have no experts to compute
        elsewhere, are True.

    Raises:
        TypeError, ValueError: an argument; the message names it.
    """
    layers, E = integer("num_layers", num_layers), integer("num_experts", num_experts)
    total = integer("num_gpu_experts", num_gpu_experts)
    first = integer("first_k_dense_replace", first_k_dense_replace)
    every = integer("moe_layer_freq", moe_layer_freq)
    for name, value, least in (
        ("num_layers", layers, 1),
        ("num_experts", E, 1),
        ("num_gpu_experts", total, 0),
        ("first_k_dense_replace", first, 0),
        ("moe_layer_freq", every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, must be {least} or more")
    names = ("frequency", *STRATEGIES)
    if strategy == "cost":
        raise ValueError(
            'strategy "cost" needs sizes and speeds: call '
            "hybrid_moe.placement.cost_placement.place_by_cost, or `hybrid-moe plan --profile`"
        )
    if strategy not in names:
        raise ValueError(f"unknown strategy {strategy!r}: there are {', '.join(sorted(names))}")
    if (activation_freq is not None) != (strategy == "frequency"):
        raise ValueError(
            f"activation_freq is {'missing' if activation_freq is None else 'given'}: the strategy "
            '"frequency" needs it, the others do not use it'
        )
    indices = torch.arange(layers)
    moe = (indices >= first) & (indices % every == 0)
    masks = torch.ones(layers, E, dtype=torch.bool)
    count = int(moe.sum())
    total = min(total, count * E)
    if activation_freq is not None:
        freq = torch.as_tensor(activation_freq)
        if tuple(freq.shape) != (layers, E):
            raise ValueError(
                f"activation_freq has shape {tuple(freq.shape)}, must be ({layers}, {E})"
            )
        masks[moe] = generate_gpu_experts_masks(freq[moe.to(freq.device)], total)
    elif count:
        masks[moe] = STRATEGIES[strategy](count, E, total)
    return masks


def _uniform(L: int, E: int, total: int) -> torch.Tensor:
    each, more = divmod(total, L)
    counts = torch.full((L, 1), each)
    counts[:more] += 1
    return torch.arange(E) < counts


def _front_loading(L: int, E: int, total: int) -> torch.Tensor:
    return (torch.arange(L * E) < total).reshape(L, E)


def _random(L: int, E: int, total: int) -> torch.Tensor:
    chosen = torch.randperm(L * E, generator=torch.Generator().manual_seed(RANDOM_SEED))[:total]
    return torch.zeros(L * E, dtype=torch.bool).index_fill_(0, chosen, True).reshape(L, E)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {"uniform": _uniform, "front-loading": _front_loading, "random": _random}
)
"""Placements without statistics, under the names of sglang-kt's --kt-expert-placement-strategy."""
