"""What Transformers would do in silence with `experts_implementation="hybrid_moe"` is refused.

Transformers takes any registered name for any model: for one whose experts it does not dispatch
nothing would happen, and for a checkpoint whose experts are stored as MXFP4 it would speak of
mismatched sizes, or of missing weights. It has no place where a registered implementation could
object, so `PreTrainedModel` gets three methods that first look, then do what they did: `post_init`
and `set_experts_implementation` for the model, `from_pretrained` for the checkpoint. A call that
does not name this package passes through.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid_moe.logs import warn_once

NAME = "hybrid_moe"
"""The `experts_implementation` under which the CPU experts are known."""

LOADS_EXPERTS = "_hybrid_moe_loads_experts"
"""Attribute of model classes whose experts this package loads itself, from any format."""

_MARK = "_hybrid_moe_guard"

_log = logging.getLogger(__name__)


def guard(modeling_utils: ModuleType) -> bool:
    """Put the checks into `PreTrainedModel` of the loaded module. Idempotent; False if it is too
    old to have experts implementations."""
    model: Any = modeling_utils.PreTrainedModel
    if not hasattr(model, "set_experts_implementation"):
        return False
    if hasattr(model.post_init, _MARK):
        return True
    post_init, select = model.post_init, model.set_experts_implementation
    load = model.__dict__["from_pretrained"].__func__

    def checked_post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        if _names_us(getattr(self.config, "_experts_implementation", None)):
            check_model(self)
        return result

    def checked_select(self: Any, experts_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if _names_us(experts_implementation):
            check_model(self)
        return select(self, experts_implementation, *args, **kwargs)

    def checked_load(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        source = pretrained_model_name_or_path
        if not _asks_for_us(kwargs) or getattr(cls, LOADS_EXPERTS, False):
            return load(cls, source, *args, **kwargs)
        check_checkpoint(source, kwargs)
        try:
            return load(cls, source, *args, **kwargs)
        except RuntimeError:
            check_checkpoint(source, kwargs)  # a repository of the hub is here by now
            raise

    for original, checked in ((post_init, checked_post_init), (select, checked_select)):
        setattr(model, original.__name__, _in_place_of(original, checked))
    model.from_pretrained = classmethod(_in_place_of(load, checked_load))
    return True


def _in_place_of(original: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = functools.wraps(original)(checked)
    setattr(wrapped, _MARK, True)
    return wrapped


def _names_us(implementation: Any) -> bool:
    if isinstance(implementation, Mapping):
        return NAME in implementation.values()
    return bool(implementation == NAME)


def _asks_for_us(kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("experts_implementation")
    if given is None:
        given = getattr(kwargs.get("config"), "_experts_implementation", None)
    return _names_us(given)


def check_model(model: Any) -> None:
    """Refuse a model that has experts, none of which Transformers dispatches; warn where it
    dispatches some. A model without any experts is let through: it may be a part of another.

    Raises:
        ValueError: names the class of the experts.
    """
    from hybrid_moe.integrations.transformers.experts_module import (
        foreign_experts,
        is_experts,
        unsupported,
    )
    from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts

    foreign = foreign_experts(model)
    if not foreign:
        return
    message = unsupported(type(model).__name__, foreign)
    if any(is_experts(m) or isinstance(m, HybridExperts) for m in model.modules()):
        warn_once(message)
    else:
        raise ValueError(message)


def check_checkpoint(source: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose experts Transformers cannot read, if its files are here.

    Args:
        source: what `from_pretrained` was given.
        kwargs: the same, `subfolder`, `variant`, `revision` and `cache_dir` among them.

    Raises:
        NotImplementedError: its experts are stored in a format that Transformers neither has a
            place for nor is told to dequantise.
    """
    from hybrid_moe.formats.table import BF16
    from hybrid_moe.formats.tensors import CheckpointError
    from hybrid_moe.loaders import Checkpoint

    folder = _folder(source, kwargs)
    if folder is None or _is_dequantised(folder):
        return
    try:
        with closing(Checkpoint.open(folder, variant=kwargs.get("variant"))) as checkpoint:
            formats = {
                fmt for layer in checkpoint.layers for fmt in checkpoint.layer(layer).formats.each
            }
    except (CheckpointError, OSError, NotImplementedError) as error:
        _log.debug("the experts of %s were not looked at: %s", folder, error)
        return  # what is wrong with it is for Transformers to say
    stored = sorted(fmt.name for fmt in formats if fmt is not BF16)
    if stored:
        raise NotImplementedError(
            f'{source} stores its experts as {", ".join(stored)}: experts_implementation="{NAME}" '
            "takes experts that Transformers has loaded, and it loads them as BF16 only. Use "
            f"hybrid_moe.from_pretrained({str(source)!r}), which reads them as they are stored. "
            "(For BF16 checkpoints the name is known after hybrid_moe.register(), or where "
            "hybrid_moe is imported after transformers)"
        )


def _folder(source: Any, kwargs: Mapping[str, Any]) -> Path | None:
    """Where the checkpoint's files are; None if they are not on this machine."""
    if source is None or kwargs.get("gguf_file") or kwargs.get("state_dict"):
        return None
    subfolder = Path(kwargs.get("subfolder") or "")
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(
        str(source), str(subfolder / "config.json"),
        cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision"),
    )  # fmt: skip
    return Path(config).parent if isinstance(config, str) else None


def _is_dequantised(folder: Path) -> bool:
    """Whether the configuration tells Transformers of a quantisation that it knows."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from hybrid_moe.formats.tensors import CheckpointError
    from hybrid_moe.loaders.model_config import CONFIG_NAME
    from hybrid_moe.loaders.regular import read_json

    try:
        config, _ = read_json(folder / CONFIG_NAME)
    except CheckpointError:  # for Transformers to say
        return False
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method in AUTO_QUANTIZATION_CONFIG_MAPPING
