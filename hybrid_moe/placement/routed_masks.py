"""Hot experts from a routing profile's file and an amount: "profile.json@25%", "profile.json@24GB".

A routing profile says which experts are used, not how much GPU memory is free; so an amount goes
with it. Which experts are hot then is decided by `routed_costs.place_by_bytes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from hybrid_moe.placement.cost_placement import Bool
from hybrid_moe.placement.profile import PlacementProfile
from hybrid_moe.placement.routed_costs import place_by_bytes
from hybrid_moe.placement.routing_profile import RoutedModel, RoutingProfile
from hybrid_moe.placement.routing_profile_file import is_routing_profile, read_routing_profile
from hybrid_moe.text import format_bytes, parse_size

_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


def is_routing_file(path: Path) -> bool:
    """Whether a file is a routing profile. One that is no JSON is none: who reads it as a placement
    says so."""
    return _is_routing_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _is_routing_file(path: Path, modified: int) -> bool:
    try:
        return is_routing_profile(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        return False


def parse_amount(text: str, everything: int) -> int:
    """Bytes of "25%" of `everything`, or of "24GB".

    Raises:
        ValueError: neither, or more than 100 %.
    """
    percent = _PERCENT.fullmatch(text)
    if percent is None:
        return parse_size(text)
    share = float(percent[1]) / 100
    if share > 1:
        raise ValueError(f"{text} must be 100% at most")
    return round(share * everything)


def routed_masks(
    path: Path, amount: str, experts: int, nbytes: Mapping[int, int]
) -> dict[int, Bool]:
    """The hot experts of a model.

    Args:
        path: a routing profile.
        amount: GPU memory for experts, or a percentage of the bytes of all.
        experts: E of each layer.
        nbytes: of an expert on the GPU, by layer.

    Returns:
        Layer -> bool [E].

    Raises:
        ValueError: the file is damaged, was measured on another model, or there is no such amount.
    """
    profile = read_routing_profile(path)
    layers = tuple(sorted(nbytes))
    profile.check(RoutedModel("", 0, experts, profile.model.top_k, layers), str(path))
    everything = experts * sum(nbytes.values())
    try:
        budget = parse_amount(amount, everything)
    except ValueError as error:
        raise ValueError(f"gpu_experts is {path}@{amount}: {error}") from error
    if budget and budget < min(nbytes.values()):
        least = format_bytes(min(nbytes.values()))
        raise ValueError(f"gpu_experts is {path}@{amount}, too little for one expert of {least}")
    return place_by_bytes(profile, nbytes, budget)


def placement_of_number(path: Path, experts_per_layer: int) -> PlacementProfile:
    """A placement with so many hot experts in a layer on average, by a routing profile; the same
    for every layer that asks.

    Raises:
        ValueError: the file is damaged, or a layer has fewer experts.
    """
    return _placement_of_number(path, path.stat().st_mtime_ns, experts_per_layer)


@lru_cache(maxsize=4)
def _placement_of_number(path: Path, modified: int, count: int) -> PlacementProfile:
    profile = read_routing_profile(path)
    _check_number(path, profile, count)
    layers = profile.model.layers
    masks = place_by_bytes(profile, dict.fromkeys(layers, 1), count * len(layers))
    ids = {layer: tuple(mask.nonzero()[0].tolist()) for layer, mask in masks.items()}
    return PlacementProfile(path, ids)


def _check_number(path: Path, profile: RoutingProfile, count: int) -> None:
    if not 0 <= count <= profile.model.num_experts:
        raise ValueError(
            f"{count} experts of each layer on the GPU, by {path}: its layers have 0 to "
            f"{profile.model.num_experts}"
        )
