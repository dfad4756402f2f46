"""Dense layers of a model: from a checkpoint's files into strips, or from torch's memory.

While Transformers builds a model, the layers whose tensors can be read directly are replaced by
empty packed ones, which it finds nothing to load into. What it has to convert it loads as ever, and
that is packed afterwards, as the layers of a loaded model are.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.choose import Choice, choose
from hybrid_moe.integrations.transformers.dense.embedding import refuse_resizing
from hybrid_moe.integrations.transformers.dense.hybrid_linear import share_inputs
from hybrid_moe.integrations.transformers.dense.packing import (
    Weight,
    build,
    load,
    load_all,
    nbytes_of,
    torch_weight,
)
from hybrid_moe.integrations.transformers.dense.stored_linear import (
    FP8,
    SCALES,
    StoredLinear,
    StoredReader,
    direct_keys,
    find_stored,
)
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight
from hybrid_moe.integrations.transformers.experts_module import ExpertsSpec
from hybrid_moe.integrations.transformers.packing_bar import PackingBar
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.logs import warn_once

logger = logging.getLogger(__name__)

MENTIONED = 64 << 20
"""Bytes of layers that stay with torch from which saying so is a warning: torch reads them in some
4 ms, which every token waits for."""


@dataclass(frozen=True)
class DenseOptions:
    """How dense layers are packed.

    Attributes:
        fmt: format of the strips.
        pool: worker threads.
    """

    fmt: WeightFormat
    pool: PoolConfig


def dense_layers(
    checkpoint: Checkpoint, options: DenseOptions, kwargs: Mapping[str, Any]
) -> CheckpointLayers | None:
    """What takes a checkpoint's dense layers; None, which is logged, where they are not to be on
    the CPU or are to be quantised by Transformers.

    Args:
        checkpoint: open.
        options: format and threads.
        kwargs: for Transformers' `from_pretrained`.
    """
    placed = kwargs.get("device_map", torch.get_default_device())
    devices = placed.values() if isinstance(placed, Mapping) else [placed]
    obstacle = None
    if any(str(device).partition(":")[0] not in ("None", "cpu") for device in devices):
        obstacle = f"device_map={placed!r}"
    for name in ("quantization_config", "distributed_config", "tp_plan"):
        if kwargs.get(name) is not None:
            obstacle = name
    if obstacle is None:
        return CheckpointLayers(checkpoint, options, kwargs.get("key_mapping"))
    logger.warning("%s: dense layers stay with torch (%s)", checkpoint.index.path, obstacle)
    return None


def offload_dense(
    model: nn.Module,
    experts: Mapping[str, ExpertsSpec],
    options: DenseOptions,
    bar: PackingBar,
) -> None:
    """Pack the linear layers of a loaded model, one after the other, each freed before the next.

    Args:
        model: changed in place.
        experts: the sizes of its experts modules by name, whether they are packed or not.
        options: format and threads.
        bar: shows how far it is.
    """
    choice = choose(model, experts)
    _report(choice, type(model).__name__)
    layers, tied = choice.weights(), dict(choice.tied)
    dtypes = [str(linear.weight.dtype).removeprefix("torch.") for linear in layers.values()]
    _say_rounding(type(model).__name__, Counter(dtypes))
    built = build(model, choice, options.fmt, options.pool)
    del choice  # it holds the layers, which are to be freed one by one
    bar.expect(sum(map(nbytes_of, built.values())))
    for name in [name for name in built if name not in tied.values()]:
        module, threads = built.pop(name), options.pool.threads
        load(name, module, lambda key: torch_weight(layers[key], key), threads, bar)
        place(model, name, module)
        if name in tied:
            place(model, tied[name], built.pop(tied[name]))
        for key in [key for key in layers if key == name or key.startswith(f"{name}.")]:
            del layers[key]
    _forget_ties(model)
    finish(model)


def finish(model: nn.Module) -> None:
    """What is to be done once all layers are packed."""
    share_inputs(model)
    refuse_resizing(model)


class CheckpointLayers:
    """The dense layers of a model that are read from its checkpoint directly."""

    def __init__(
        self, checkpoint: Checkpoint, options: DenseOptions, key_mapping: Mapping[str, str] | None
    ) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: its experts and draft layers are left alone.
            options: format and threads.
            key_mapping: renamings that the user gives Transformers, if any.
        """
        self.options = options
        self._checkpoint, self._key_mapping = checkpoint, key_mapping
        self._reader = StoredReader(checkpoint.index)
        self._stored: dict[str, StoredLinear] = {}
        self._built: dict[str, nn.Module] = {}
        self._taken: set[str] = set()

    def swap(self, model: Any, experts: Mapping[str, ExpertsSpec]) -> None:
        """Replace layers by empty packed ones.

        Args:
            model: a Transformers model on meta, whose weights have not been loaded.
            experts: the sizes of its experts modules by name.
        """
        if getattr(model.config, "quantization_config", None) and not fp8_block(model.config):
            return  # Transformers' quantiser may replace what it takes for a linear layer
        index = self._checkpoint.index
        choice = choose(model, experts, _loaded_in_float32(model))
        keys = direct_keys(model, self._other_keys(), self._key_mapping)
        for head, embedding in list(choice.tied.items()):
            names = (f"{embedding}.weight", f"{head}.weight")
            found = [keys[name] for name in names if name in keys]
            if len(found) == 2 and not self._reader.equal(*found):
                del choice.tied[head]  # as Transformers does, and says
            elif found:
                keys[f"{head}.weight"] = found[0]
        block = fp8_block(model.config)
        left: list[str] = []
        for name, linear in choice.weights().items():
            stored = find_stored(index, keys, name, linear, block)
            if stored is None:
                choice.keep(name, "not read directly")
                left.append(name)
            else:
                self._stored[name] = stored
        self._built = build(model, choice, self.options.fmt, self.options.pool)
        for name, module in self._built.items():
            place(model, name, module)
        _forget_ties(model)
        place_of = {key: name for name, key in keys.items()}
        for name, stored in self._stored.items():
            for tensor in stored.tensors:
                self._taken.add(place_of.get(tensor.key, tensor.key))
            self._taken |= {f"{name}.weight"} | {f"{name}.{s}" for s in SCALES if stored.scale}
        self._taken |= {f"{embedding}.weight" for embedding in choice.tied.values()}
        prefix = f"{model.base_model_prefix}."
        self._taken = {key.removeprefix(prefix) for key in self._taken}
        self._say_conversions(left)

    def owns(self, key: str, prefix: str) -> bool:
        """Whether a key, as Transformers renames it, is of a tensor that is read here.

        Args:
            prefix: the model's `base_model_prefix`, which keys may have or lack.
        """
        return key.removeprefix(f"{prefix}.") in self._taken

    def load(self, model: nn.Module, experts: Mapping[str, ExpertsSpec], bar: PackingBar) -> None:
        """Fill what has been replaced, and pack what Transformers has loaded.

        Args:
            model: the model that was given to `swap`, loaded.
            experts: the sizes of its experts modules by name.
            bar: shows how far it is.

        Raises:
            CheckpointError: a file is truncated.
        """
        bar.expect(sum(map(nbytes_of, self._built.values())))
        offload_dense(model, experts, self.options, bar)

        def weight(name: str) -> Weight:
            return self._reader.weight(self._stored[name])

        load_all(self._built, weight, self.options.pool.threads, bar)
        self._built.clear()

    def _other_keys(self) -> list[str]:
        """Those of neither experts nor draft layers."""
        checkpoint = self._checkpoint
        return [
            key
            for key in checkpoint.index.tensors
            if key not in checkpoint.expert_keys and not checkpoint.drafts.owns(key)
        ]

    def _say_conversions(self, left: list[str]) -> None:
        dtypes = Counter(stored.weight.dtype for stored in self._stored.values())
        fp8 = dtypes.pop(FP8, 0)
        path = str(self._checkpoint.index.path)
        if fp8:
            warn_once(f"{path}: {fp8} dense layers are stored as FP8: dequantised to BF16")
        if left:
            warn_once(
                f"{path}: {len(left)} dense layers ({left[0]}, ...) are not stored as they are "
                "used: Transformers loads them, and they are packed afterwards"
            )
        _say_rounding(path, dtypes)


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`, in the mode (training or not) of the one that was there."""
    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), attribute, module.train(old.training))


def fp8_block(config: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the configuration says that weights are FP8."""
    given = getattr(config, "quantization_config", None)
    as_dict = given if isinstance(given, dict) or given is None else given.to_dict()
    if not as_dict or as_dict.get("quant_method") != "fp8":
        return None
    rows, columns = as_dict.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def _loaded_in_float32(model: Any) -> Callable[[str], bool]:
    """Whether Transformers loads the parameter of a name in float32, though the model is not."""
    plan = model._get_dtype_plan(torch.get_default_dtype())
    patterns = [name.replace("*", ".*") for name, dtype in plan.items() if dtype == torch.float32]
    pattern = re.compile("|".join(patterns) or "(?!)")
    return lambda name: pattern.search(name) is not None


def _forget_ties(model: nn.Module) -> None:
    """Transformers would compare and tie the parameters of layers that have no values yet."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if ties:
        every = model.named_parameters(remove_duplicate=False)
        packed = {name for name, p in every if isinstance(p, PackedWeight)}
        kept = {target: source for target, source in ties.items() if target not in packed}
        model.all_tied_weights_keys = kept  # type: ignore[assignment]


def _say_rounding(where: str, dtypes: Mapping[str, int]) -> None:
    for dtype, count in dtypes.items():
        if dtype not in ("BF16", "bfloat16"):
            warn_once(f"{where}: {count} dense layers are stored as {dtype}: rounded to BF16")


def _report(choice: Choice, where: str) -> None:
    """Say what stays with torch."""
    kept = choice.report()
    if kept:
        level = logging.WARNING if choice.kept_nbytes >= MENTIONED else logging.INFO
        logger.log(level, "%s: linear layers that stay with torch: %s", where, kept)
