"""What llama.cpp reads has the weights of the checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic.checkpoint import make_checkpoint
from synthetic.models import MODELS

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import bf16_to_f32
from hybrid_moe.loaders import Checkpoint

gguf = pytest.importorskip("gguf", reason="a dev dependency: pip install gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(MODELS["small"], tmp_path_factory.mktemp("models"), threads=2)


def values(file: Path) -> dict[str, Any]:
    """Name -> float32 weights, as the package that defines the files decodes them."""
    return {
        str(t.name): gguf.quants.dequantize(t.data, t.tensor_type)
        for t in gguf.GGUFReader(file).tensors
    }


def test_the_weights_are_the_same(small: Path, tmp_path: Path) -> None:
    from synthetic.gguf_files import write_gguf

    dense, experts = map(values, write_gguf(small, tmp_path, "bf16"))
    checkpoint = Checkpoint.open(small)
    index, stored = checkpoint.index, checkpoint.layer(2).expert(5, MXFP4, None)
    for name in ("gate", "up", "down"):
        matrix = getattr(stored, name)
        expected = MXFP4.dequantize(matrix.codes, matrix.scales)
        assert np.array_equal(experts[f"blk.2.ffn_{name}_exps.weight"][5], expected)
        assert np.array_equal(experts[f"blk.2.ffn_{name}_exps.bias"][5], matrix.bias)
    names = {
        "output.weight": "lm_head.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.attn_k.bias": "model.layers.1.self_attn.k_proj.bias",
        "blk.3.attn_sinks.weight": "model.layers.3.self_attn.sinks",
        "blk.0.ffn_gate_inp.weight": "model.layers.0.mlp.router.weight",
    }
    for name, key in names.items():
        bits = np.asarray(index.read(key)).view(np.uint16)
        assert np.array_equal(dense[name].reshape(bits.shape), bf16_to_f32(bits))
    tensors = len(index.tensors) - len(checkpoint.expert_keys)
    assert len(dense) == tensors and len(experts) == 4 * 6


def test_both_formats_of_linear_layers_share_the_experts(small: Path, tmp_path: Path) -> None:
    from synthetic.gguf_files import write_gguf

    first, second = (write_gguf(small, tmp_path, dense) for dense in ("bf16", "int8"))
    assert first[1] == second[1] and first[0] != second[0]
    plain, rounded = values(first[0])["output.weight"], values(second[0])["output.weight"]
    groups = np.abs(plain).reshape(-1, 32).max(1)
    errors = np.abs(plain - rounded).reshape(-1, 32).max(1)
    assert errors.max() > 0 and np.all(errors <= groups * (0.5 / 127 + 2**-10))
    with pytest.raises(ValueError, match="dense=q9"):
        write_gguf(small, tmp_path, "q9")
