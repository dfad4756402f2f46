"""Which experts are on the GPU: those that were asked for, the best ones by measured routing, or as
many first ids as fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.table import AS_STORED
from hybrid_moe.placement.balanced_packing import divide_experts
from hybrid_moe.placement.cost_placement import CostPlacement, LayerCost, place_by_cost
from hybrid_moe.placement.profile import PlacementProfile
from hybrid_moe.placement.ranks import experts_of_rank
from hybrid_moe.placement.routed_costs import expected_use, layer_cost
from hybrid_moe.placement.routing_profile import RoutedModel
from hybrid_moe.planning.model import HotExperts, Model
from hybrid_moe.planning.plan import MeasuredRouting, Request
from hybrid_moe.planning.prediction import step_of

Use = Mapping[int, npt.NDArray[np.float64]]


def choose_hot(model: Model, request: Request, fixed: int) -> HotExperts:
    """Experts on the GPU, beside `fixed` bytes on each.

    Raises:
        ValueError: a profile or a number that does not fit the model.
    """
    if request.profile is not None:
        return of_profile(model, request.profile)
    if request.num_gpu_experts is not None:
        return first_ids(model, request.num_gpu_experts, "as given, the first ids of every layer")
    if not model.hot_possible:
        differ = "none: the layers' experts differ in format"
        unread = "none: no checkpoint that SGLang can read them from"
        return first_ids(model, 0, differ if model.gpu_format == AS_STORED else unread)
    if request.routing is not None:
        return best_by_cost(model, request, request.routing, request.room - fixed)
    return as_many_as_fit(model, request.room - fixed, len(request.gpus))


def hot_bytes(model: Model, hot: HotExperts) -> int:
    """Bytes of the experts on the GPU, over all GPUs."""
    return sum(hot.counts[layer.layer] * layer.on_gpu for layer in model.layers)


def hot_share(model: Model, hot: HotExperts, gpus: int) -> int:
    """Bytes of them on the fullest GPU. The serving engine cuts each expert into parts for the
    GPUs; slots hold whole ones."""
    if model.gpu_backend is None:
        return -(-hot_bytes(model, hot) // gpus)
    return max(
        sum(
            layer.on_gpu
            * len(experts_of_rank(range(hot.counts[layer.layer]), layer.layer, rank, gpus))
            for layer in model.layers
        )
        for rank in range(gpus)
    )


def first_ids(model: Model, count: int, rule: str) -> HotExperts:
    """The first `count` experts of every layer.

    Raises:
        ValueError: more than there are, or fewer than none.
    """
    if not 0 <= count <= model.num_experts:
        raise ValueError(f"{count} experts on the GPU: a layer has 0 to {model.num_experts}")
    return HotExperts({layer.layer: min(count, layer.num_experts) for layer in model.layers}, rule)


def of_profile(model: Model, profile: PlacementProfile) -> HotExperts:
    """The experts that a profile names.

    Raises:
        ValueError: it lacks a layer, or names an expert that there is not.
    """
    counts = {
        layer.layer: len(profile.experts_of(layer.layer, layer.num_experts))
        for layer in model.layers
    }
    return HotExperts(counts, f"{profile.path.name}", profile)


def as_many_as_fit(model: Model, room: int, gpus: int) -> HotExperts:
    """The same number of experts in every layer, as many as `room` bytes of each GPU hold."""
    each = sum(layer.on_gpu for layer in model.layers)
    rule = "as many as fit, the first ids of every layer"
    hot = first_ids(model, max(0, min(model.num_experts, room * gpus // each)), rule)
    while hot.most and hot_share(model, hot, gpus) > room:
        hot = first_ids(model, hot.most - 1, rule)
    return hot


def best_by_cost(model: Model, request: Request, routing: MeasuredRouting, room: int) -> HotExperts:
    """The experts with which a token is fastest, in `room` bytes of each GPU.

    Raises:
        ValueError: the routing is that of another model.
    """
    gpus = len(request.gpus)
    costs, use = costs_of(model, request, routing)
    budget = max(0, room) * gpus
    while True:
        hot = placed(place_by_cost(costs, budget), routing, use)
        over = hot_share(model, hot, gpus) - max(0, room)
        if over <= 0 or not hot.most:
            return hot if model.gpu_backend is None else _divided(hot, routing, gpus)
        budget = min(budget, hot_bytes(model, hot)) - over  # whole experts, unevenly divided


def _divided(hot: HotExperts, routing: MeasuredRouting, gpus: int) -> HotExperts:
    """Whole experts on several GPUs: each layer's divided by use, as many on each as they would be
    without a profile."""
    if gpus == 1 or hot.profile is None or hot.use is None:
        return hot
    pairs, ranks = routing.profile.pairs, {}
    for row, (layer, experts) in enumerate(hot.profile.layers.items()):
        sizes = [len(experts_of_rank(experts, layer, rank, gpus)) for rank in range(gpus)]
        together = None if pairs is None else pairs[row]
        ranks[layer] = divide_experts(hot.use[layer], experts, sizes, together)
    return replace(hot, profile=replace(hot.profile, ranks=ranks))


def costs_of(
    model: Model, request: Request, routing: MeasuredRouting
) -> tuple[list[LayerCost], Use]:
    """What the experts of each layer cost one token, and the share of tokens that take them.

    Raises:
        ValueError: the routing is that of another model.
    """
    layers = tuple(layer.layer for layer in model.layers)
    measured = RoutedModel("", model.hidden, model.num_experts, model.top_k, layers)
    routing.profile.check(measured, str(routing.path))
    use = dict(zip(layers, expected_use(routing.profile), strict=True))
    nothing = HotExperts(dict.fromkeys(layers, 0), "none")
    step = step_of(model, nothing, request.cpu, request.gpus)
    sizes = {layer.layer: layer.on_gpu for layer in model.layers}
    costs = [
        layer_cost(work, use[work.layer], sizes[work.layer], step.rates)
        for work in step.works
        if work.expert is not None
    ]
    return costs, use


def placed(placement: CostPlacement, routing: MeasuredRouting, use: Use) -> HotExperts:
    """A placement as a plan has it."""
    ids = {layer: tuple(mask.nonzero()[0].tolist()) for layer, mask in placement.masks.items()}
    rule = f"by cost, from {routing.path.name}"
    if placement.ratio > 1:
        rule += f", {100 * (placement.ratio - 1):.1g} % from the best at most"
    profile = PlacementProfile(routing.placement_path, ids)
    return HotExperts({layer: len(own) for layer, own in ids.items()}, rule, profile, use)
