"""`KTMoEWrapper(method="LLAMAFILE")`: layers of GGUF models compute what their weights say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_moe.formats.table import BF16
from tests.hybrid_moe.cases import wrapper
from tests.loaders.gguf.files import E_, H_, I_, expert_entries, model_file, write_split
from tests.loaders.gguf.test_experts import library_weights
from tests.reference import assert_within, evaluate

SIZES = {
    "num_experts": E_,
    "num_experts_per_tok": 2,
    "hidden_size": H_,
    "moe_intermediate_size": I_,
}


@pytest.mark.parametrize(
    ("gate", "down", "bias"),
    [
        ("Q4_K", "Q6_K", False),
        ("Q5_K", "Q8_0", False),
        ("Q3_K", "Q4_K", True),
        ("Q2_K", "Q3_K", False),
        ("Q4_0", "Q5_0", False),
        ("Q5_1", "Q4_1", False),
        ("IQ4_XS", "IQ4_NL", False),
        ("MXFP4", "MXFP4", True),
        ("BF16", "BF16", False),
    ],
)
def test_a_layer_of_a_file(gate: str, down: str, bias: bool, tmp_path: Path) -> None:
    """Against float64 on the weights that the `gguf` library reads, within the bound of the
    contract."""
    paths = write_split(
        tmp_path, model_file(*expert_entries(1, gate, down, bias=bias), layers=2), [1, 2 + 3 * bias]
    )
    layer = wrapper(
        **SIZES, layer_idx=1, weight_path=str(paths[0]), method="LLAMAFILE", num_gpu_experts=0
    )
    layer.load_weights(torch.arange(E_))
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(5, H_, generator=rng).to(torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]])
    weights = torch.rand(5, 2, generator=rng) + 0.1
    output = layer.forward(hidden, ids, weights)
    stored = library_weights(*paths)
    biases = {
        f"{name}_bias": stored[f"blk.1.ffn_{name}_exps.bias"].astype(np.float64)
        for name in ("gate", "up", "down")
        if bias
    }
    expected = evaluate(
        hidden.double().numpy(),
        ids.numpy(),
        weights.numpy(),
        *(stored[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")),
        **biases,
        **({"activation_error": 0.0} if BF16.name in (gate, down) else {}),
    )
    assert_within(output.double().numpy(), expected)


def test_a_method_that_the_file_does_not_hold(tmp_path: Path) -> None:
    """The message says which do."""
    path = model_file(*expert_entries(0)).write(tmp_path / "model.gguf")
    layer = wrapper(**SIZES, weight_path=str(path), method="MXFP4", num_gpu_experts=0)
    with pytest.raises(ValueError, match=r"Q4_K \(gate, up\) and Q6_K \(down\).*LLAMAFILE"):
        layer.load_weights(torch.arange(E_))
