"""A checkpoint's routed experts, one layer at a time, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.completeness import missing_layers
from hybrid_moe.loaders.describe import describe_layer
from hybrid_moe.loaders.drafts import DraftLayers
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.gguf.gguf_layers import GgufLayers, is_gguf
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.loaders.gguf.metadata_config import config_of
from hybrid_moe.loaders.kt_kernel import KT_KERNEL, describe_kt_layer, kt_layers
from hybrid_moe.loaders.layout import layout_of_model
from hybrid_moe.loaders.model_config import CONFIG_NAME, NUM_EXPERTS, TOP_K, ModelConfig
from hybrid_moe.loaders.naming import LayerKeys, find_layers
from hybrid_moe.loaders.quantization import Quantization
from hybrid_moe.loaders.regular import Stamp, read_json, stamp_of
from hybrid_moe.loaders.safetensors import SafetensorsIndex
from hybrid_moe.text import format_ranges


class Checkpoint:
    """A directory (or file) of safetensors, or a GGUF model, seen as layers of routed experts.

    Attributes:
        index: every tensor, experts or not.
        config: the model's `config.json`; without one, what a GGUF model's metadata says by its
            names, and empty for safetensors.
        model: the same, read as Transformers reads it.
        drafts: which layers are draft layers.
        layers: numbers of the layers that have routed experts, dense layers counted, ascending;
            draft layers left out.
        expert_keys: keys of all tensors that belong to routed experts of those layers.
    """

    def __init__(
        self,
        index: SafetensorsIndex,
        config: Mapping[str, Any],
        stamps: Mapping[Path, Stamp | None] | None = None,
    ) -> None:
        self.index = index
        self._stamps = {**(stamps or {}), **index.stamps}
        self.config = config
        self.model = ModelConfig(config, f"{CONFIG_NAME} of {index.path}")
        self._gguf = GgufLayers(index) if isinstance(index, GgufIndex) else None
        self._layers = self._find_layers() if self._gguf is None else self._gguf.keys
        self.drafts = DraftLayers(self.model, index.tensors)
        self.layers = tuple(layer for layer in self._layers if layer not in self.drafts)
        self.expert_keys = frozenset(
            key for layer in self.layers for key in self._layers[layer].keys
        )
        self._quantization = Quantization.of(config)
        self._ask_model = cache(lambda: layout_of_model(self.model))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        require_complete: bool = True,
    ) -> Checkpoint:
        """Scan the headers at `path`, a directory or one file of safetensors or GGUF; no data is
        read.

        Args:
            path: the directory or file.
            variant: as Transformers' `from_pretrained` takes it, see `choose_files`.
            require_complete: refuse a checkpoint that lacks layers.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            CheckpointError: see `SafetensorsIndex.open`; or the names contradict each other; or
                layers are missing.
        """
        config, stamps = _read_config(Path(path))
        if is_gguf(Path(path)):
            opened = GgufIndex.open_gguf(Path(path))
            checkpoint = cls(opened, config or config_of(opened.metadata), stamps)
        else:
            named = config.get("transformers_weights")
            index = SafetensorsIndex.open(path, variant=variant, named=named)
            checkpoint = cls(index, config, stamps)
        if require_complete and (missing := checkpoint.missing_layers):
            raise CheckpointError("; ".join(missing))
        return checkpoint

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """What is said of layers that should be in the checkpoint and are not."""
        return missing_layers(self.index, self._layers, self.model)

    @property
    def is_current(self) -> bool:
        """Whether all files are as they were when they were read."""
        return all(stamp_of(file) == stamp for file, stamp in self._stamps.items())

    def keys_of(self, layer: int) -> LayerKeys:
        """Names of the expert tensors of `layer`. Raises `CheckpointError` where it has none."""
        keys = self._layers.get(layer)
        if keys is None:
            have = f"layers {format_ranges(self.layers)} have" if self.layers else "no layer has"
            raise CheckpointError(
                f"layer {layer} of {self.index.path} has no routed experts under a known name; "
                f"{have} some"
            )
        return keys

    def layer(self, layer: int) -> ExpertSource:
        """The experts of one layer (or draft layer), with every name, shape and dtype checked.

        Raises:
            CheckpointError: the layer has no experts, an expert is missing or incomplete, there
                are more or fewer than `config.json` says, or a shape or dtype is wrong.
        """
        source = self._describe(self.keys_of(layer))
        for name in NUM_EXPERTS:
            count = self.model.stated.get(name)
            if isinstance(count, int) and count != source.num_experts:
                raise CheckpointError(
                    f"layer {layer} of {self.index.path} has {source.num_experts} experts, "
                    f"config.json says {name}={count}; "
                    f"the last one found is {source.last_key}"
                )
        return source

    def sources(self) -> dict[int, ExpertSource]:
        """All layers of experts by number, ascending; draft layers left out.

        Raises:
            CheckpointError: there is none, or one is damaged (see `layer`).
        """
        if not self.layers:
            raise CheckpointError(f"{self.index.path} has no routed experts under a known name")
        return {number: self.layer(number) for number in self.layers}

    def routing_problem(
        self, sources: Iterable[ExpertSource], model: ModelConfig | None = None
    ) -> str | None:
        """What is wrong with the number of experts that a token takes, None if nothing is known.

        Args:
            sources: the layers.
            model: the configuration that counts; None for the checkpoint's own.
        """
        model = model or self.model
        for source in sources:
            top_k, E = model.of_layer(TOP_K, source.layer), source.num_experts
            if top_k is not None and not 1 <= top_k <= E:
                return (
                    f"{model.where} lets a token take {top_k} experts of {E}: "
                    f"num_experts_per_tok must be between 1 and {E}"
                )
        return None

    def _find_layers(self) -> dict[int, LayerKeys]:
        """The layers of safetensors that have routed experts, by number, ascending."""
        return find_layers(self.index.tensors) or kt_layers(self.index.tensors)

    def _describe(self, keys: LayerKeys) -> ExpertSource:
        """The experts of a layer, checked as far as its own tensors tell."""
        if self._gguf is not None:
            return self._gguf.describe(keys.layer)
        if keys.scheme is KT_KERNEL:
            return describe_kt_layer(self.index, keys)
        return describe_layer(self.index, keys, self._ask_model, self._quantization)

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self.index.close()


def _read_config(path: Path) -> tuple[Mapping[str, Any], Mapping[Path, Stamp | None]]:
    file = path / CONFIG_NAME
    if not path.is_dir():
        return {}, {}
    if not file.exists() and not file.is_symlink():
        return {}, {file: None}
    config, stamp = read_json(file)
    return config, {file: stamp}
