"""`config.json` of a language model, read as Transformers reads it.

A published `config.json` leaves out what equals a default, calls one thing by the family's own
name, nests the language model under parts of a larger one, and says what its layers are by an
interval. Transformers' configuration class of the family knows all that. It is asked where it is
installed and has the family; elsewhere a few rules of our own stand in. What a file states counts
before what either derives.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.regular import shortened

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""Where the language model's part lies in a larger model's configuration, perhaps repeatedly."""

NUM_LAYERS = ("num_hidden_layers",)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
    "moe_top_k", "top_k_experts",
)  # fmt: skip
NUM_DRAFT_LAYERS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules",
)  # fmt: skip
"""Names of one number, in the order in which they are looked for."""

MAX_LAYERS = 1000
"""Layers of a model; published ones have at most some 130. Lists by layer, and the modules that
Transformers builds, are as long as a configuration says."""

_LAYER_COUNT = re.compile(r"layers?$|^depth$")
"""Matches names of numbers of layers, as families call them."""


def _check_layer_counts(raw: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` where any part of a `config.json` has more than `MAX_LAYERS` layers:
    before it is handed to code that would fill the memory with them."""
    parts: list[Any] = [raw]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            for name, value in part.items():
                if type(value) is int and value > MAX_LAYERS and _LAYER_COUNT.search(name):
                    raise CheckpointError(
                        f"{where} says {shortened(name)[1:-1]}={shortened(value)}, which is no "
                        f"number of layers: at most {MAX_LAYERS} are possible"
                    )
            parts += part.values()
        elif isinstance(part, list):
            parts += part


class ModelConfig:
    """The language model's part of a `config.json`.

    Attributes:
        raw: the whole file; empty where there is none.
        where: what messages call it.

    Raises:
        CheckpointError: it has more than `MAX_LAYERS` layers.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = CONFIG_NAME) -> None:
        _check_layer_counts(raw, where)
        self.raw = raw
        self.where = where

    @cached_property
    def stated(self) -> Mapping[str, Any]:
        """What the file itself says of the language model."""
        part = self.raw
        while nested := [part[name] for name in NESTED if isinstance(part.get(name), Mapping)]:
            part = nested[0]
        return part

    @cached_property
    def full(self) -> Mapping[str, Any]:
        """That, and what follows from it: defaults, other names, `layer_types`.

        Imports Transformers where it is installed.
        """
        derived = transformers_text_config(self.raw)
        values = None if derived is None else _as_mapping(derived)
        if values is None:
            return {**_own_rules(self.stated), **self.stated}
        return {**self.stated, **{name: v for name, v in values.items() if v is not None}}

    def get(self, names: tuple[str, ...]) -> Any:
        """The first of `names` that has a value: as stated, else as derived; None for none."""
        stated = _first(self.stated, names)
        return _first(self.full, names) if stated is None else stated

    def integer(self, names: tuple[str, ...]) -> int | None:
        """The same, where it is one integer; None for anything else."""
        value = self.get(names)
        return value if type(value) is int else None

    @cached_property
    def num_layers(self) -> int | None:
        """Layers of the model that the file states, perhaps by the family's own name; draft layers
        are not counted. A family's default says nothing of a checkpoint: None then."""
        count = _first(self.stated, NUM_LAYERS)
        if count is None:
            own = getattr(transformers_text_config(self.raw), "attribute_map", {})
            count = _first(self.stated, tuple(own[name] for name in NUM_LAYERS if name in own))
        return count if type(count) is int else None

    def of_layer(self, names: tuple[str, ...], layer: int) -> int | None:
        """The same for a number that a list may give layer by layer."""
        value = self.get(names)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        return value if type(value) is int else None


def _first(part: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((part[name] for name in names if part.get(name) is not None), None)


def transformers_text_config(raw: Mapping[str, Any]) -> Any | None:
    """Transformers' configuration of the language model; None where it does not know the family,
    is not installed, or cannot read this file (which is logged)."""
    family = raw.get("model_type")
    if not isinstance(family, str):
        return None
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    if family not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(raw)))
        return config.get_text_config(decoder=True)
    except Exception as error:  # a family's class may raise anything on a file that it rejects
        _warn_of_rejected(family, error)
        return None


def _warn_of_rejected(family: str, error: Exception) -> None:
    logger.warning(
        "Transformers does not accept this config.json of model_type %s (%s: %s): only what "
        "it states is used, without the family's defaults",
        family,
        type(error).__name__,
        error,
    )


def _as_mapping(config: Any) -> dict[str, Any] | None:
    """Every value of a Transformers configuration, under each of its names; None where the class
    has accepted a file that it cannot use (which is logged)."""
    try:
        values: dict[str, Any] = config.to_dict()
        for name, own in config.attribute_map.items():
            values.setdefault(name, values.get(own))
        values["layer_types"] = _layer_types(config)
        for name in NUM_LAYERS:  # of the layer types, in some families
            values.setdefault(name, getattr(config, name, None))
    except Exception as error:  # as above
        _warn_of_rejected(config.model_type, error)
        return None
    return values


def _layer_types(config: Any) -> list[str] | None:
    """What each layer keeps in a cache, as Transformers' own caches derive it."""
    try:
        from transformers.cache_utils import get_layer_types_and_kwargs
    except ImportError:  # an older release
        return getattr(config, "layer_types", None)
    types: list[str] = get_layer_types_and_kwargs(config)[0]
    return types


def _own_rules(stated: Mapping[str, Any]) -> dict[str, Any]:
    """`layer_types` where the file gives an interval instead (Qwen3-Next, Jamba)."""
    layers = stated.get("num_hidden_layers")
    interval, offset, others = stated.get("full_attention_interval"), -1, "linear_attention"
    if interval is None:
        interval, offset = stated.get("attn_layer_period"), stated.get("attn_layer_offset", 0)
    if type(layers) is not int or type(interval) is not int or interval < 1:
        return {}
    types = [
        "full_attention" if (layer - offset) % interval == 0 else others for layer in range(layers)
    ]
    return {"layer_types": types}
