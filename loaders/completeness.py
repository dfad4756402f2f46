"""Which layers should have routed experts, and do not.

Nothing in a checkpoint lists its layers: a lost shard without an index leaves a smaller model that
looks whole. `config.json` says how many layers there are; a layer without routed experts must show
the MLP that it has instead, or be dense by the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.model_config import ModelConfig
from hybrid_moe.loaders.naming import LayerKeys
from hybrid_moe.loaders.safetensors import SafetensorsIndex

_ROUTED = re.compile(
    r"\b(experts|shared_experts?|router|block_sparse_moe)\b|(\b(mlp|ffn|moe)\.|^)gate\."
)
_MLP = re.compile(r"\b(mlp|ffn|feed_forward)\b")
_REPORTED = 8


def missing_layers(
    index: SafetensorsIndex, found: Mapping[int, LayerKeys], model: ModelConfig
) -> tuple[str, ...]:
    """What is wrong with each layer that should have routed experts and has none.

    Args:
        index: the checkpoint's tensors.
        found: the layers that have experts.
        model: says how many layers there are, and which are dense; where it does not, nothing is
            known to be missing.

    Raises:
        CheckpointError: an impossible number of layers.
    """
    if not found:
        return ()
    count, config = model.num_layers, model.stated
    if count is None:
        return ()
    if count < 1:
        raise CheckpointError(
            f"config.json of {index.path} says num_hidden_layers={count}, which is no number of "
            "layers"
        )
    if all(layer in found for layer in range(count)):
        return ()
    parts = _parts_of_layers(index, next(iter(found.values())).prefix + "layers.")
    experts_alone = all(names == {"moe"} for names in parts.values())
    problems: list[str] = []
    for layer in range(count):
        names = parts.get(layer, set())
        if layer in found or _is_dense(layer, config) or ("mlp" in names and "moe" not in names):
            continue
        if names == {"other"} and any(name in config for name in _LAYER_KINDS):
            continue
        if experts_alone and layer < min(found) and not any(name in config for name in _DENSE):
            continue
        what = "routed experts under a known name" if names else "tensors"
        problems.append(
            f"layer {layer} of {index.path} has no {what}, though config.json says "
            f"num_hidden_layers={count}: is a file missing?"
        )
        if len(problems) == _REPORTED:
            break
    return tuple(problems)


def _parts_of_layers(index: SafetensorsIndex, stem: str) -> dict[int, set[str]]:
    """What each layer shows: "moe" (experts, or what stands beside them), "mlp", "other"."""
    parts: dict[int, set[str]] = {}
    for key in index.tensors:
        if not key.startswith(stem):
            continue
        number, _, name = key[len(stem) :].partition(".")
        if len(number) <= 6 and number.isascii() and number.isdecimal():
            kinds = (("moe", _ROUTED), ("mlp", _MLP))
            kind = next((kind for kind, pattern in kinds if pattern.search(name)), "other")
            parts.setdefault(int(number), set()).add(kind)
    return parts


def _is_dense(layer: int, config: Mapping[str, Any]) -> bool:
    """Whether the configuration says that the layer has no routed experts."""
    return any(says(config.get(name), layer) for name, says in _DENSE.items())


def _at(value: Any, layer: int) -> Any:
    """The entry of a list for `layer`, if there is one."""
    return value[layer] if isinstance(value, list) and layer < len(value) else None


_DENSE: Mapping[str, Callable[[Any, int], bool]] = {
    "mlp_layer_types": lambda value, layer: _at(value, layer) == "dense",
    "mlp_only_layers": lambda value, layer: isinstance(value, list) and layer in value,
    "first_k_dense_replace": lambda value, layer: isinstance(value, int) and layer < value,
    "decoder_sparse_step": lambda value, layer: (
        isinstance(value, int) and value > 0 and (layer + 1) % value != 0
    ),
    "moe_layer_freq": lambda value, layer: (
        _at(value, layer) == 0 or (isinstance(value, int) and value > 0 and layer % value != 0)
    ),
}
"""Entries of `config.json` that tell dense layers, and how."""

_LAYER_KINDS = ("layers_block_type", "hybrid_override_pattern")
"""Entries of models of which some layers are attention, or a recurrence, alone."""
