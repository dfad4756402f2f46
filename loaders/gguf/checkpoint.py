"""A GGUF model seen as layers of routed experts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.gguf.config import config_of
from hybrid_moe.loaders.gguf.experts import GgufLayer, describe_gguf_layer
from hybrid_moe.loaders.gguf.header import MAGIC, BlockTensor
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.loaders.gguf.names import PREFIX, expert_tensor, is_one_expert
from hybrid_moe.loaders.gguf.splits import ENDING
from hybrid_moe.loaders.naming import LayerKeys, NamingScheme
from hybrid_moe.loaders.regular import Stamp, open_regular

SCHEME = NamingScheme(
    "GGUF (blk.L.ffn_{gate,up,down}_exps)",
    "mlp.experts",
    "gate_exps",
    "up_exps",
    "down_exps",
    fused=True,
)


def is_gguf(path: Path) -> bool:
    """Whether what lies at `path` is a GGUF file, or a folder whose weights are GGUF: safetensors
    beside it are what Transformers reads, so they come first."""
    if path.is_dir():
        return any(path.glob(f"*{ENDING}")) and not any(path.glob("*.safetensors*"))
    if path.suffix == ENDING or not path.is_file():
        return path.suffix == ENDING
    descriptor, _ = open_regular(path)  # a blob without an ending (Ollama)
    try:
        return os.pread(descriptor, len(MAGIC), 0) == MAGIC
    finally:
        os.close(descriptor)


class GgufCheckpoint(Checkpoint):
    """A GGUF file, several of one model, or a folder of them.

    Attributes:
        index: every tensor, and the metadata.
        config: what the metadata says by the names of `config.json`; or that file, where it lies in
            the folder.
    """

    index: GgufIndex

    def __init__(
        self,
        index: GgufIndex,
        config: Mapping[str, Any],
        stamps: Mapping[Path, Stamp | None] | None = None,
    ) -> None:
        self._experts = _by_layer(index)
        stated = bool(config)
        super().__init__(index, config or config_of(index.metadata), stamps)
        if not stated:
            self.model.where = f"the metadata of {index.files[0]}"

    @classmethod
    def open_gguf(
        cls, path: Path, config: Mapping[str, Any], stamps: Mapping[Path, Stamp | None]
    ) -> GgufCheckpoint:
        """Scan the headers at `path`; no data is read. See `GgufIndex.open_gguf`.

        Args:
            config: the folder's `config.json`; empty where there is none.
            stamps: of that file.
        """
        return cls(GgufIndex.open_gguf(path), config, stamps)

    def _find_layers(self) -> dict[int, LayerKeys]:
        return {
            layer: LayerKeys(layer, PREFIX, SCHEME, keys=[t.key for t in tensors.values()])
            for layer, tensors in self._experts.items()
        }

    def _describe(self, keys: LayerKeys) -> GgufLayer:
        return describe_gguf_layer(self.index, keys.layer, self._experts[keys.layer])


def _by_layer(index: GgufIndex) -> dict[int, dict[str, BlockTensor]]:
    """The tensors of each layer's experts by projection and ending, "up.weight"; layers ascending.

    Raises:
        CheckpointError: experts have a tensor each, as before March 2024.
    """
    layers: dict[int, dict[str, BlockTensor]] = defaultdict(dict)
    for key in index.tensors:
        tensor = index.info(key)
        found = expert_tensor(tensor.stored_name)
        if found is not None:
            layers[found[0]][f"{found[1]}.{found[2]}"] = tensor
        elif is_one_expert(tensor.stored_name):
            raise CheckpointError(
                f"{tensor.where}: one tensor for each expert, as files had them until March 2024: "
                "convert the model again with a newer llama.cpp"
            )
    return dict(sorted(layers.items()))
