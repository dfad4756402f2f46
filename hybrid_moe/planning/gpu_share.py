"""Which experts go on the GPU: as many as fit beside everything else, or those of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from hybrid_moe.placement.profile import PlacementProfile
from hybrid_moe.planning.model import LayerExperts, Model


@dataclass(frozen=True)
class Placement:
    """Experts of each layer by place.

    Attributes:
        hot: layer -> number of its experts on the GPU.
        rule: how they were chosen.
        profile: the profile that says which; None for the first ids.
    """

    hot: Mapping[int, int]
    rule: str
    profile: PlacementProfile | None = None

    @cached_property
    def most(self) -> int:
        """Experts on the GPU in the layer that has the most."""
        return max(self.hot.values(), default=0)

    def cold(self, layer: LayerExperts) -> int:
        """Experts of a layer on the CPU."""
        return layer.num_experts - self.hot[layer.layer]

    def cold_share(self, layer: LayerExperts) -> float:
        """Share of a layer's experts on the CPU."""
        return self.cold(layer) / layer.num_experts


def hot_bytes(model: Model, placement: Placement) -> int:
    """Bytes of the experts on the GPU, over all GPUs."""
    return sum(placement.hot[layer.layer] * layer.on_gpu for layer in model.layers)


def first_ids(model: Model, count: int, rule: str) -> Placement:
    """The first `count` experts of every layer.

    Raises:
        ValueError: more than there are, or fewer than none.
    """
    if not 0 <= count <= model.num_experts:
        raise ValueError(f"{count} experts on the GPU: a layer has 0 to {model.num_experts}")
    return Placement({layer.layer: min(count, layer.num_experts) for layer in model.layers}, rule)


def of_profile(model: Model, profile: PlacementProfile) -> Placement:
    """The experts that a profile names.

    Raises:
        ValueError: it lacks a layer, or names an expert that there is not.
    """
    hot = {
        layer.layer: len(profile.experts_of(layer.layer, layer.num_experts))
        for layer in model.layers
    }
    return Placement(hot, f"{profile.path.name}", profile)


def as_many_as_fit(model: Model, room: int) -> Placement:
    """The same number of experts in every layer, as many as `room` bytes hold (of all GPUs)."""
    each = sum(layer.on_gpu for layer in model.layers)
    count = max(0, min(model.num_experts, room // each))
    return first_ids(model, count, "as many as fit, the first ids of every layer")
