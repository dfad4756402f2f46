"""A Transformers model whose experts go from the checkpoint into strips, past torch.

Transformers builds a model on the meta device, loads each tensor of the checkpoint that the model
has a place for, and never reads one that it has no place for. So a subclass of the model's class
swaps the experts modules for `HybridExperts` (no parameters) as soon as the model is built, and
everything else about loading (renamed keys, tied weights, dtypes, shards) is Transformers' own.
Then the loaders fill the `HybridExperts`, layer by layer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.dense.dense_loading import CheckpointLayers
from hybrid_moe.integrations.transformers.experts_module import (
    ExpertsSpec,
    experts_spec,
    find_experts,
)
from hybrid_moe.integrations.transformers.guard import LOADS_EXPERTS
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.loaders import Checkpoint, ExpertSource
from hybrid_moe.loaders.expert_source import check_sizes

logger = logging.getLogger(__name__)

PLAIN_DTYPES = frozenset({"BF16", "F16", "F32", "F64", "I64", "BOOL"})
"""safetensors dtypes of tensors that are what they seem: no quantisation stores its codes so."""

HARMLESS = re.compile(
    r"(?:attn|attention|mixer)\.(?:\w+\.)*(?:[qkv]|kv|prob_output)_(?:scale|zero_point)$"
    r"|\.[kv]_proj\.output_scale$"
    r"|\.rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)$"
)
"""Keys of tensors that a model may lack without harm: scales of a quantised KV cache, which here
stays in BF16, and rotary tables, which are computed."""


def swap(model: torch.nn.Module) -> dict[str, HybridExperts]:
    """Replace every experts module of `model` by an empty `HybridExperts`; returns them by name.

    Raises:
        NotImplementedError: an experts module computes something that this package does not.
        ValueError: the model has no experts.
    """
    swapped = {
        name: HybridExperts(experts_spec(m, name)) for name, m in find_experts(model).items()
    }
    for name, experts in swapped.items():
        replace_module(model, name, experts)
    return swapped


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put `module` at `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def layer_index(name: str) -> int:
    """The layer in an experts module's name: `model.layers.3.mlp.experts` -> 3.

    Raises:
        NotImplementedError: the name has no layer.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if match is None:
        raise NotImplementedError(f"{name}: no layer index in the name of this experts module")
    return int(match[1])


def experts_source(
    sources: Mapping[int, ExpertSource], checkpoint: Checkpoint, name: str, spec: ExpertsSpec
) -> ExpertSource:
    """The checkpoint's experts for the experts module called `name`, checked against its sizes.

    Args:
        sources: the checkpoint's layers, by number.

    Raises:
        CheckpointError: the layer's experts are not those that the model has.
    """
    layer = layer_index(name)
    source = sources[layer] if layer in sources else checkpoint.layer(layer)
    source = source.told_layout("halves" if spec.concatenated else "interleaved")
    check_sizes(source, spec.num_experts, spec.hidden, spec.intermediate)
    if source.has_bias != spec.biased:
        state = "has biases, which" if source.has_bias else "lacks the biases that"
        verb = "does not take" if source.has_bias else "needs"
        raise CheckpointError(
            f"layer {source.layer} of {source.path} {state} {spec.where} {verb} "
            f"(experts as in {source.last_key})"
        )
    return source


def load_skeleton(
    checkpoint: Checkpoint, kwargs: Mapping[str, Any], dense: CheckpointLayers | None = None
) -> Any:
    """The model of a checkpoint with all of its weights but the experts', which are empty.

    Args:
        checkpoint: a directory in Transformers' layout, whose experts are in formats of ours.
        kwargs: for Transformers' `from_pretrained`.
        dense: takes dense layers too, which are empty as well; None for none.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model, or has another shape.
    """
    from transformers import AutoConfig

    directory, kwargs = checkpoint.index.path, dict(kwargs)
    trust = {"trust_remote_code": kwargs.pop("trust_remote_code", None)}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(directory, **trust)
    original = model_class(config, directory, trust["trust_remote_code"])
    config = _config_of(original, config)
    drop_experts_quantization(config, only_experts=rest_is_plain(checkpoint))
    if dense is not None:
        dequantize_fp8(config)
    hybrid = with_hybrid_experts(original, checkpoint.drafts.patterns, dense)
    model, info = hybrid.from_pretrained(
        directory,
        config=config,
        experts_implementation="hybrid_moe",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        **kwargs,
    )
    model.__class__ = original
    check_complete(info, directory)
    return model


def model_class(config: Any, directory: Path, trust_remote_code: bool | None) -> Any:
    """The class that `AutoModelForCausalLM` would build for `config`.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForCausalLM

    remote = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if remote is not None and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, directory)
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"{directory}: Transformers has no causal language model for "
            f"model_type {config.model_type!r}"
        )
    found = mapping[type(config)]
    if isinstance(found, (list, tuple)):
        by_name = {cls.__name__: cls for cls in found}
        named = [by_name[a] for a in config.architectures or () if a in by_name]
        return (named or list(found))[0]
    return found


def _config_of(model_class: Any, config: Any) -> Any:
    """The configuration that a class takes: the language model's part of a larger model's where
    the class is the language model alone (what `AutoModelForCausalLM` does)."""
    part = config.sub_configs.get("text_config")
    if part is None or getattr(model_class, "config_class", None) is not part:
        return config
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def rest_is_plain(checkpoint: Checkpoint) -> bool:
    """Whether all tensors but those of experts and draft layers are stored unquantised."""
    return all(
        tensor.dtype in PLAIN_DTYPES
        for key, tensor in checkpoint.index.tensors.items()
        if key not in checkpoint.expert_keys
        and not checkpoint.drafts.owns(key)
        and not HARMLESS.search(key)
    )


def drop_experts_quantization(config: Any, *, only_experts: bool) -> None:
    """Take a `quantization_config` that concerns experts alone out of `config`, in place; tell one
    that concerns other weights too (FP8) to leave the experts alone.

    What is stored decides, not the method's name: many methods can quantise experts alone, and
    Transformers would want the package of each for weights that it does not load.

    Args:
        only_experts: nothing else in the checkpoint is quantised.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if only_experts:
        del config.quantization_config
    elif isinstance(quantization, dict) and as_dict.get("quant_method") == "fp8":
        skipped = list(as_dict.get("modules_to_not_convert") or [])
        config.quantization_config = {**as_dict, "modules_to_not_convert": [*skipped, ".experts"]}


def dequantize_fp8(config: Any) -> None:
    """Let Transformers dequantise whatever FP8 weights it loads, in place: beside dense layers that
    are held in BF16, on a machine with a GPU too."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
        config.quantization_config = {**quantization, "dequantize": True}


def with_hybrid_experts(
    original: Any, unread: Iterable[str], dense: CheckpointLayers | None
) -> Any:
    """`original` with experts modules, and layers that `dense` takes, replaced at the end of its
    construction, and keys that these patterns match left unread."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original.__init__(self, config, *args, **kwargs)
        names = swap(self)
        if dense is not None:
            dense.swap(self, {name: experts.spec for name, experts in names.items()})
        # Keys of the checkpoint below an experts module belong to the loaders: neither read nor
        # reported. The model's prefix is optional, as published checkpoints may lack it.
        below = [rf"(^|\.){re.escape(_without_prefix(self, name))}\." for name in names]
        ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = ignored | set(below) | set(unread)

    def _adjust_missing_and_unexpected_keys(self: Any, info: Any) -> None:
        if dense is not None:
            prefix = self.base_model_prefix
            info.unexpected_keys = {k for k in info.unexpected_keys if not dense.owns(k, prefix)}
        original._adjust_missing_and_unexpected_keys(self, info)

    # Transformers reads the source of a model's module, and messages name the class
    return type(
        original.__name__,
        (original,),
        {
            "__init__": __init__,
            "_adjust_missing_and_unexpected_keys": _adjust_missing_and_unexpected_keys,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            LOADS_EXPERTS: True,
        },
    )


def _without_prefix(model: Any, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def check_complete(info: Mapping[str, Any], directory: Path) -> None:
    """Raise `CheckpointError` for the first few tensors that did not find their place; a notice of
    those that are `HARMLESS` is enough."""
    problems = {
        "missing_keys": "lacks",
        "unexpected_keys": "has tensors that the model has no place for:",
        "mismatched_keys": "has another shape than the model for",
    }
    for kind, verb in problems.items():
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
        if kind == "unexpected_keys":
            unused = [key for key in keys if HARMLESS.search(key)]
            keys = [key for key in keys if key not in unused]
            if unused:
                logger.warning("%s has tensors that are not used: %s", directory, _some(unused))
        if keys:
            raise CheckpointError(f"{directory} {verb} {_some(keys)}")
    if info["error_msgs"]:
        raise CheckpointError(f"{directory}: {'; '.join(info['error_msgs'])}")


def _some(keys: list[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
