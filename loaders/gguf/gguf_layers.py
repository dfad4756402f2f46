"""The layers of a GGUF model that have routed experts."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_experts import GgufLayer, describe_gguf_layer
from hybrid_moe.loaders.gguf.gguf_header import MAGIC, BlockTensor
from hybrid_moe.loaders.gguf.index import GgufIndex
from hybrid_moe.loaders.gguf.names import PREFIX, expert_tensor, is_one_expert
from hybrid_moe.loaders.gguf.splits import ENDING
from hybrid_moe.loaders.naming import LayerKeys, NamingScheme
from hybrid_moe.loaders.regular import open_regular

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
        return path.suffix == ENDING and path.exists()
    descriptor, _ = open_regular(path)  # a blob without an ending (Ollama)
    try:
        return os.pread(descriptor, len(MAGIC), 0) == MAGIC
    finally:
        os.close(descriptor)


class GgufLayers:
    """The experts of each layer of a model.

    Attributes:
        keys: of the layers that have experts, by number, ascending.

    Raises:
        CheckpointError: experts have a tensor each, as before March 2024.
    """

    def __init__(self, index: GgufIndex) -> None:
        self._index = index
        self._tensors = _by_layer(index)
        self.keys = {
            layer: LayerKeys(layer, PREFIX, SCHEME, keys=[t.key for t in tensors.values()])
            for layer, tensors in self._tensors.items()
        }

    def describe(self, layer: int) -> GgufLayer:
        """The experts of a layer, see `describe_gguf_layer`."""
        return describe_gguf_layer(self._index, layer, self._tensors[layer])


def _by_layer(index: GgufIndex) -> dict[int, dict[str, BlockTensor]]:
    """The tensors of each layer's experts by projection and ending, "up.weight"."""
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
