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
from collections.abc import Mapping
from functools import cached_property
from typing import Any

logger = logging.getLogger(__name__)

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


class ModelConfig:
    """The language model's part of a `config.json`.

    Attributes:
        raw: the whole file; empty where there is none.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

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
        if derived is None:
            return {**_own_rules(self.stated), **self.stated}
        known = {name: value for name, value in _as_mapping(derived).items() if value is not None}
        return {**self.stated, **known}

    def get(self, names: tuple[str, ...]) -> Any:
        """The first of `names` that has a value: as stated, else as derived; None for none."""
        stated = _first(self.stated, names)
        return _first(self.full, names) if stated is None else stated

    def integer(self, names: tuple[str, ...]) -> int | None:
        """The same, where it is one integer; None for anything else."""
        value = self.get(names)
        return value if type(value) is int else None

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
        logger.warning(
            "Transformers does not accept this config.json of model_type %s (%s: %s): only what "
            "it states is used, without the family's defaults",
            family,
            type(error).__name__,
            error,
        )
        return None


def _as_mapping(config: Any) -> dict[str, Any]:
    """Every value of a Transformers configuration, under each of its names."""
    values: dict[str, Any] = config.to_dict()
    for name, own in config.attribute_map.items():
        values.setdefault(name, values.get(own))
    values["layer_types"] = _layer_types(config)
    for name in NUM_LAYERS:  # of the layer types, in some families
        values.setdefault(name, getattr(config, name, None))
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
