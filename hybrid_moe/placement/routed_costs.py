"""What a layer's experts cost a step, from measured routing and the timeline's model of a layer.

`layer_cost` is `schedule.layer_times` taken apart by expert: the sum over a set of experts is what
the model says of that set. Tokens of a batch are taken to choose independently of each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hybrid_moe.placement.cost_placement import Bool, LayerCost, place_by_cost
from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.schedule.layer_times import gpu_seconds
from hybrid_moe.schedule.layer_work import LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

F64 = npt.NDArray[np.float64]

PRIOR_USES = 16
"""Uses of each expert, on average, that the counts of all phases are worth beside those of decode:
a share of 16 choices in a layer is known to a quarter of itself (1 / sqrt(16))."""


def expected_use(profile: RoutingProfile) -> F64:
    """float64 [L, E]: the share of a decode step's tokens that will take each expert, k in all.

    The shares of decode, drawn towards those of all phases: a profile of long prompts and short
    answers says little about decode by itself, but what it says counts as soon as it is much.
    """
    E, k = profile.model.num_experts, profile.model.top_k
    decode = profile.decode.astype(np.float64)
    prior = PRIOR_USES * E * profile.shares()
    both = decode + prior
    use: F64 = np.minimum(k * both / both.sum(1, keepdims=True), 1.0)
    return use


def layer_cost(
    work: LayerWork, use: F64, nbytes: int, rates: MachineRates, tokens: float = 1
) -> LayerCost:
    """Of one layer with experts.

    Args:
        work: its amounts.
        use: float64 [E], the share of tokens that take each expert; they sum to k.
        nbytes: of GPU memory that a hot expert takes.
        rates: of the machine.
        tokens: of the batch.

    Raises:
        ValueError: the layer has no experts.
    """
    expert = work.expert
    if expert is None:
        raise ValueError(f"layer {work.layer} has no experts to place")
    met, pairs = -np.expm1(tokens * np.log1p(-np.minimum(use, 1 - 1e-12))), tokens * use
    further = np.maximum(pairs - met, 0.0) / expert.many_tokens_rate
    reading = met * expert.nbytes / rates.cpu_read
    multiplying = expert.weights * (met / expert.one_token_rate + further)
    on_gpu = met * expert.gpu_nbytes / rates.gpu_read
    flops = 2 * pairs * expert.weights / rates.gpu_flops
    return LayerCost(
        work.layer,
        nbytes,
        cold=np.stack([reading, multiplying]),
        hot=np.stack([on_gpu, flops]),
        handover=rates.submit + rates.back,
        beside=gpu_seconds(work.shared, rates),
    )


def place_by_bytes(
    profile: RoutingProfile, nbytes: Mapping[int, int], budget: int
) -> dict[int, Bool]:
    """Hot experts where nothing is known of the machine: those that keep most bytes from being read
    by the CPU. What `plan` and `serve` know beside (hand-over, the GPU's speed) is left out.

    Args:
        profile: measured routing.
        nbytes: of an expert, for each layer of the profile.
        budget: bytes.

    Returns:
        Layer -> bool [E].
    """
    nothing = np.zeros((1, profile.model.num_experts))
    costs = [
        LayerCost(layer, nbytes[layer], cold=use[None] * nbytes[layer], hot=nothing)
        for layer, use in zip(profile.model.layers, expected_use(profile), strict=True)
    ]
    return dict(place_by_cost(costs, budget).masks)
