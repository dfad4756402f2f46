"""`gpu_experts`: which experts are hot, in each form in which users say it.

| given | hot are |
|---|---|
| 0.25, "25%", "0.25" | that share of all experts |
| "24GB", "512MiB" | as many whole experts as so much GPU memory holds |
| bool [L, E] | those that the mask has, as of `generate_gpu_experts_masks` |
| {0: [3, 17], 1: []} | these ids of these layers |
| a path | those of a placement profile, see `hybrid_moe.placement.profile` |
| "profile.json@25%", "profile.json@24GB" | by a routing profile, see `placement.routed_masks` |

A share and a budget alone are spread evenly: as many experts in every layer, the first ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_moe.placement.profile import PlacementProfile, read_profile
from hybrid_moe.placement.routed_masks import is_routing_file, routed_masks
from hybrid_moe.runtime.arguments import integer, integers
from hybrid_moe.text import format_bytes, parse_size

FORMS = (
    'a share of all experts (0.25 or "25%"), GPU memory ("24GB"), bool masks [layers, experts], '
    "a mapping of layers to expert ids, the path of a placement profile, or that of a routing "
    'profile with a share or memory ("profile.json@25%")'
)
"""What is right, for messages."""

_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")
_SHARE = re.compile(r"\s*(\d*\.\d+|[01]\.)\s*")
_SIZE = re.compile(r"\s*\d+(?:\.\d+)?\s*(?:[KMGT]?I?B|[KMGT])\s*", re.IGNORECASE)
_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


@dataclass(frozen=True)
class LayerOfExperts:
    """What a placement asks about a layer.

    Attributes:
        layer: its index in the model, dense layers counted.
        num_experts: routed experts E.
        nbytes: what one of them takes on the GPU.
    """

    layer: int
    num_experts: int
    nbytes: int


def hot_masks(
    gpu_experts: Any, layers: Sequence[LayerOfExperts], num_layers: int | None = None
) -> dict[int, torch.Tensor]:
    """The hot experts of a model.

    Args:
        gpu_experts: see above.
        layers: the model's layers with experts, ascending, one at least.
        num_layers: all of its layers; None where nobody knows. Masks may have a row for each of
            them, and profiles may name them.

    Returns:
        Layer -> bool [E] on the CPU, True for hot experts.

    Raises:
        FileNotFoundError: there is no such profile.
        TypeError, ValueError: not one of the forms, or it does not fit the model; the message
            says `gpu_experts`, or names the file.
    """
    if isinstance(gpu_experts, (str, os.PathLike)):
        return _of_text(gpu_experts, layers, num_layers)
    if isinstance(gpu_experts, Mapping):
        return _of_profile(_as_profile(gpu_experts), layers, num_layers)
    if isinstance(gpu_experts, (torch.Tensor, np.ndarray)):
        return _of_masks(torch.as_tensor(gpu_experts), layers, num_layers)
    if isinstance(gpu_experts, bool) or not isinstance(gpu_experts, Real):
        raise TypeError(f"gpu_experts is {_shown(gpu_experts)}, must be {FORMS}")
    if isinstance(gpu_experts, Integral) and gpu_experts:
        raise _number_of_experts(gpu_experts)
    return _of_share(float(gpu_experts), gpu_experts, layers)


def _of_text(
    given: str | os.PathLike[str], layers: Sequence[LayerOfExperts], num_layers: int | None
) -> dict[int, torch.Tensor]:
    if isinstance(given, str):
        if percent := _PERCENT.fullmatch(given):
            return _of_share(float(percent[1]) / 100, given, layers)
        if _SHARE.fullmatch(given):
            return _of_share(float(given), given, layers)
        if _SIZE.fullmatch(given):
            return _of_budget(given, layers)
        if _INTEGER.fullmatch(given):
            raise _number_of_experts(given)
    file = Path(given).expanduser()
    before, at, amount = os.fspath(given).rpartition("@")
    routing = Path(before).expanduser()
    if at and not file.is_file() and routing.is_file() and is_routing_file(routing):
        return _of_routing(routing, amount, layers)
    if not str(given) or not file.is_file():
        raise FileNotFoundError(
            f"gpu_experts is {os.fspath(given)!r}, which is no file; it must be {FORMS}"
        )
    if is_routing_file(file):
        raise ValueError(
            f"gpu_experts is {os.fspath(given)!r}, a routing profile: say how much of the GPU the "
            f"experts may take, {file.name}@25% of all of them or {file.name}@24GB"
        )
    return _of_profile(read_profile(given), layers, num_layers)


def _of_routing(
    file: Path, amount: str, layers: Sequence[LayerOfExperts]
) -> dict[int, torch.Tensor]:
    nbytes = {layer.layer: layer.nbytes for layer in layers}
    masks = routed_masks(file, amount, max(layer.num_experts for layer in layers), nbytes)
    return {layer: torch.from_numpy(mask) for layer, mask in masks.items()}


def _number_of_experts(given: Any) -> ValueError:
    """1 could be one expert of each layer, one in all, or all of them."""
    return ValueError(
        f"gpu_experts is {given!r}, and a number of experts could be of a layer or of all: "
        f"give {FORMS}"
    )


def _of_share(
    share: float, given: Any, layers: Sequence[LayerOfExperts]
) -> dict[int, torch.Tensor]:
    if not 0 <= share <= 1:  # nor a NaN
        raise ValueError(f"gpu_experts is {given!r}, a share must be between 0 and 1 (100%)")
    everything = sum(layer.num_experts for layer in layers)
    count = round(share * everything)
    if share and not count:
        raise ValueError(f"gpu_experts is {given!r}, less than one of {everything} experts")
    return _spread(count, [1] * len(layers), layers)


def _of_budget(given: str, layers: Sequence[LayerOfExperts]) -> dict[int, torch.Tensor]:
    budget = parse_size(given)
    least = min(layer.nbytes for layer in layers)
    if budget < least:
        raise ValueError(
            f"gpu_experts is {given!r}, too little for one expert of {format_bytes(least)}"
        )
    return _spread(budget, [layer.nbytes for layer in layers], layers)


def _spread(
    room: int, costs: Sequence[int], layers: Sequence[LayerOfExperts]
) -> dict[int, torch.Tensor]:
    """One expert for every layer in turn, as long as there is room for what it costs."""
    counts = [0] * len(layers)
    for count in range(max(layer.num_experts for layer in layers)):
        for at, (layer, cost) in enumerate(zip(layers, costs, strict=True)):
            if count < layer.num_experts and cost <= room:
                counts[at] += 1
                room -= cost
    return {
        layer.layer: torch.arange(layer.num_experts) < count
        for layer, count in zip(layers, counts, strict=True)
    }


def _of_masks(
    masks: torch.Tensor, layers: Sequence[LayerOfExperts], num_layers: int | None
) -> dict[int, torch.Tensor]:
    if masks.layout is not torch.strided or masks.is_meta:
        raise ValueError("gpu_experts must be an ordinary tensor, not a sparse or a meta one")
    if masks.dtype != torch.bool:
        raise TypeError(f"gpu_experts are masks of {masks.dtype}, must be bool")
    rows = {len(layers): "with experts"}
    if num_layers is not None:
        rows.setdefault(num_layers, "in all")
    E = max(layer.num_experts for layer in layers)
    if masks.dim() != 2 or masks.shape[0] not in rows or masks.shape[1] != E:
        allowed = " or ".join(f"[{count}, {E}]" for count in rows)
        meaning = ", ".join(f"{count} layers {what}" for count, what in rows.items())
        raise ValueError(
            f"gpu_experts are masks of shape {list(masks.shape)}, must be {allowed} "
            f"({meaning}, {E} experts)"
        )
    masks, of_all = masks.detach().cpu(), masks.shape[0] != len(layers)
    hot = {}
    for row, layer in enumerate(layers):
        mask = masks[layer.layer if of_all else row]
        if mask[layer.num_experts :].any():
            raise ValueError(
                f"gpu_experts: layer {layer.layer} has experts 0..{layer.num_experts - 1}, and its "
                "mask is True beyond"
            )
        hot[layer.layer] = mask[: layer.num_experts].clone()
    return hot


def _as_profile(given: Mapping[Any, Any]) -> PlacementProfile:
    """A mapping of layers to ids as a profile; messages call it `gpu_experts`."""
    layers = {}
    for key, value in given.items():
        layer = integer("a layer of gpu_experts", key)
        ids = integers(f"gpu_experts[{layer}]", f"an expert of gpu_experts[{layer}]", value)
        if len(set(ids)) != len(ids) or min(ids, default=0) < 0:
            raise ValueError(
                f"gpu_experts[{layer}] is {_shown(value)}, must be distinct expert ids from 0 on"
            )
        layers[layer] = tuple(sorted(ids))
    return PlacementProfile(Path("gpu_experts"), layers)


def _of_profile(
    profile: PlacementProfile, layers: Sequence[LayerOfExperts], num_layers: int | None
) -> dict[int, torch.Tensor]:
    end = layers[-1].layer + 1 if num_layers is None else num_layers
    strange = [layer for layer in profile.layers if not 0 <= layer < end]
    if strange:
        raise ValueError(
            f"{profile.path} has layer {strange[0]}, but the model has layers 0..{end - 1}"
        )
    hot = {}
    for layer in layers:
        mask = torch.zeros(layer.num_experts, dtype=torch.bool)
        mask[list(profile.experts_of(layer.layer, layer.num_experts))] = True
        hot[layer.layer] = mask
    return hot


def _shown(value: Any) -> str:
    """Short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
