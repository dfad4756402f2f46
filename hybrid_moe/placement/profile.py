"""A placement profile: a JSON file that says which experts of which layer live on the GPU.

    {"0": [3, 17, 60], "1": [], "2": [0, 1, 2, 3]}

Keys are layer indices as the checkpoint counts them (dense layers included), values are expert ids.
Where several GPUs hold whole experts, a layer may say which holds which, a list for each GPU:

    {"0": [[3, 60], [17]], "1": [[], []], "2": [[0, 1], [2, 3]]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlacementProfile:
    """Experts on the GPU by layer.

    Attributes:
        path: for messages.
        layers: layer -> ids, ascending.
        ranks: layer -> ids of each of several GPUs, where the profile divides them.
    """

    path: Path
    layers: Mapping[int, tuple[int, ...]]
    ranks: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def experts_of(self, layer_idx: int, num_experts: int) -> tuple[int, ...]:
        """Ids of a layer's experts on the GPU, ascending.

        Raises:
            ValueError: the profile does not have the layer, or names an expert that it has not.
        """
        if layer_idx not in self.layers:
            raise ValueError(
                f"{self.path} has no layer {layer_idx} (it has {sorted(self.layers)}): "
                "an empty list keeps a layer's experts on the CPU"
            )
        experts = self.layers[layer_idx]
        if experts and experts[-1] >= num_experts:
            raise ValueError(
                f"{self.path}: layer {layer_idx} has expert {experts[-1]}, but the model's layers "
                f"have experts 0..{num_experts - 1}"
            )
        return experts


def read_profile(path: str | os.PathLike[str]) -> PlacementProfile:
    """The profile in a file; every layer of a model asks for it, so the last ones are kept.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, or not such a table; the message says where.
    """
    file = Path(path).expanduser()
    return _read(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(file: Path, modified: int) -> PlacementProfile:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must be a table of layers, not {type(data).__name__}")
    layers = {_layer(file, key): _experts(file, key, value) for key, value in data.items()}
    ranks = {
        int(key): tuple(_experts(file, key, ids) for ids in value)
        for key, value in data.items()
        if _is_divided(value)
    }
    return PlacementProfile(file, layers, ranks)


def write_profile(
    path: str | os.PathLike[str],
    layers: Mapping[int, Sequence[int]],
    ranks: Mapping[int, Sequence[Sequence[int]]] | None = None,
) -> None:
    """Write a profile: experts on the GPU by layer index, and of these layers of which `ranks` says
    it those of each GPU."""
    table: dict[str, list[Any]] = {}
    for layer in sorted(layers):
        if ranks and layer in ranks:
            table[str(layer)] = [sorted(map(int, ids)) for ids in ranks[layer]]
        else:
            table[str(layer)] = sorted(map(int, layers[layer]))
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(ids)}" for key, ids in table.items())
    Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def profile_of_masks(masks: torch.Tensor, layers: Sequence[int]) -> dict[int, list[int]]:
    """Layers as `write_profile` takes them, from masks bool [L, E] as of
    `generate_gpu_experts_masks`; `layers` are the indices of the L layers in the model."""
    if masks.dim() != 2 or len(layers) != masks.shape[0]:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}, must be [{len(layers)} layers, experts]"
        )
    pairs = zip(layers, masks, strict=True)
    return {layer: row.nonzero().flatten().tolist() for layer, row in pairs}


def _layer(file: Path, key: str) -> int:
    if not (key.isascii() and key.isdecimal()):
        raise ValueError(f'{file}: "{key}" must be the index of a layer')
    return int(key)


def _is_divided(value: Any) -> bool:
    """A list for each GPU, not of experts."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)


def _experts(file: Path, key: str, value: Any) -> tuple[int, ...]:
    if _is_divided(value):
        value = [expert for ids in value for expert in ids]
    if not isinstance(value, list):
        raise ValueError(f"{file}: layer {key} must have a list of expert ids, not {value!r}")
    for expert in value:
        if isinstance(expert, bool) or not isinstance(expert, int) or expert < 0:
            raise ValueError(f"{file}: layer {key} has {expert!r}, must be an expert id")
    if len(set(value)) != len(value):
        twice = next(expert for expert in value if value.count(expert) > 1)
        raise ValueError(f"{file}: layer {key} has expert {twice} twice")
    return tuple(sorted(value))
