"""Layers that `config.json` announces must be there; those that are dense by any sign need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.model_config import MAX_LAYERS
from hybrid_moe.loaders.safetensors import SafetensorsIndex

FILE = Path("m.safetensors")
EXPERT, ATTENTION, ROUTER = "mlp.experts.0.up_proj.weight", "self_attn.q.weight", "mlp.gate.weight"
DENSE, SHARED = "mlp.up_proj.weight", "mlp.shared_expert.up_proj.weight"
MOE = (EXPERT, ATTENTION, ROUTER)


def checkpoint(layers: dict[int, tuple[str, ...]], config: dict[str, Any]) -> Checkpoint:
    """Layers by number, with the names of their tensors."""
    keys = [f"model.layers.{layer}.{name}" for layer, names in layers.items() for name in names]
    keys += ["lm_head.weight", "visual.layers.9.mlp.up_proj.weight"]
    tensors = {key: TensorInfo(key, "BF16", (0,), FILE, 0, 0) for key in keys}
    return Checkpoint(SafetensorsIndex(FILE, tensors), config)


CASES: dict[str, tuple[dict[int, tuple[str, ...]], dict[str, Any], list[int]]] = {
    "all there": ({0: MOE, 1: MOE}, {}, []),
    "the last is gone": ({0: MOE}, {}, [1]),
    "the first is gone": ({1: MOE}, {}, [0]),
    "two are gone": ({2: MOE}, {"num_hidden_layers": 4}, [0, 1, 3]),
    "experts are gone": ({0: MOE, 1: (ATTENTION, ROUTER)}, {}, [1]),
    "experts and router are gone": ({0: MOE, 1: (ATTENTION,)}, {}, [1]),
    "shared experts are left": ({0: MOE, 1: (ATTENTION, SHARED)}, {}, [1]),
    "dense beside a router": ({0: MOE, 1: (ATTENTION, DENSE, ROUTER)}, {}, [1]),
    "dense layer": ({0: (ATTENTION, DENSE), 1: MOE}, {}, []),
    "more layers than announced": ({0: MOE, 1: MOE, 2: MOE}, {}, []),
    "no number of layers": ({1: MOE}, {"num_hidden_layers": None}, []),
    "a number that goes by the family's own name": (
        {0: MOE, 1: MOE}, {"num_hidden_layers": None, "model_type": "dbrx", "n_layers": 4}, [2, 3],
    ),
    "a number that is the family's default": (
        {0: MOE}, {"num_hidden_layers": None, "model_type": "gpt_oss"}, [],
    ),
    "no experts at all": ({0: (ATTENTION, DENSE)}, {}, []),
    "attention alone": (
        {0: (ATTENTION,), 1: MOE}, {"layers_block_type": ["attention", "moe"]}, [],
    ),
    # checkpoints of experts alone
    "only experts": ({0: (EXPERT,), 1: (EXPERT,)}, {}, []),
    "only experts, the last is gone": ({0: (EXPERT,)}, {}, [1]),
    "only experts, the first may be dense": ({1: (EXPERT,)}, {}, []),
    "dense by a list of kinds": ({1: (EXPERT,)}, {"mlp_layer_types": ["dense", "sparse"]}, []),
    "sparse by a list of kinds": ({1: (EXPERT,)}, {"mlp_layer_types": ["sparse", "sparse"]}, [0]),
    "dense by a list": ({1: (EXPERT,)}, {"mlp_only_layers": [0]}, []),
    "sparse by a list": ({1: (EXPERT,)}, {"mlp_only_layers": []}, [0]),
    "dense by the first k": ({1: (EXPERT,)}, {"first_k_dense_replace": 1}, []),
    "sparse by the first k": ({1: (EXPERT,)}, {"first_k_dense_replace": 0}, [0]),
    "dense by a step": ({1: (EXPERT,)}, {"decoder_sparse_step": 2}, []),
    "sparse by a step": ({1: (EXPERT,)}, {"decoder_sparse_step": 1}, [0]),
    "dense by a frequency": ({0: (EXPERT,)}, {"moe_layer_freq": 2}, []),
    "dense by a list of frequencies": ({1: (EXPERT,)}, {"moe_layer_freq": [0, 1]}, []),
    "sparse by a list of frequencies": ({1: (EXPERT,)}, {"moe_layer_freq": [1, 1]}, [0]),
    "nonsense": ({0: MOE}, {"mlp_layer_types": "dense", "first_k_dense_replace": "2"}, [1]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_missing_layers(name: str) -> None:
    layers, config, missing = CASES[name]
    found = checkpoint(layers, {"num_hidden_layers": 2, **config}).missing_layers
    assert [int(text.split()[1]) for text in found] == missing
    assert all("is a file missing?" in text for text in found)


@pytest.mark.parametrize("count", [0, -1, MAX_LAYERS + 1, 10**30])
def test_impossible_numbers_of_layers(count: int) -> None:
    with pytest.raises(CheckpointError, match="no number of layers"):
        _ = checkpoint({0: MOE}, {"num_hidden_layers": count}).missing_layers


def test_only_some_of_many_are_listed() -> None:
    found = checkpoint({0: MOE}, {"num_hidden_layers": MAX_LAYERS}).missing_layers
    assert 1 < len(found) < 20
