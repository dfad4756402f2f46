"""`cpu_activation="int8"`: who takes it, what it changes, and who refuses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_moe import from_pretrained, offload
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import SIZES, Weights
from tests.hybrid_moe.tiny_models import build
from tests.reference import INT8_ACTIVATION_ERROR, assert_within, evaluate

TINY = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"


def _forward(cpu_activation: str | None, weights: Weights, method: str = "INT8") -> torch.Tensor:
    wrapper = KTMoEWrapper(
        **SIZES, cpuinfer_threads=1, threadpool_count=1, method=method,
        cpu_activation=cpu_activation,
    )  # fmt: skip
    weights.load(wrapper)
    out = wrapper.forward(*_batch(), None)
    wrapper.close()
    return out


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(9, SIZES["hidden_size"], generator=rng).bfloat16()
    ids = torch.rand(9, SIZES["num_experts"], generator=rng).topk(3).indices
    return x, ids, torch.rand(9, 3, generator=rng) + 0.1


def _decoded(weights: Weights, name: str) -> np.ndarray:
    codes, scales = weights.quantized(name, INT8)
    return np.stack([INT8.exact(Matrix(c, s).planes) for c, s in zip(codes, scales, strict=True)])


def test_a_wrapper_rounds_to_8_bits() -> None:
    """Within the bound of 8 bits, and by far beyond what 16 bits lose."""
    weights = Weights.random(3)
    x, ids, p = _batch()
    gate, up, down = (_decoded(weights, name) for name in ("gate", "up", "down"))
    arguments = (x.double().numpy(), ids.numpy(), p.numpy(), gate, up, down)
    expected = evaluate(*arguments, activation_error=INT8_ACTIVATION_ERROR)
    exact = evaluate(*arguments)
    narrow, wide = (_forward(a, weights).double().numpy() for a in ("int8", None))
    assert_within(narrow, expected)
    assert_within(wide, exact)
    error, least = (np.sqrt(((out - exact.value) ** 2).mean()) for out in (narrow, wide))
    assert error > 2 * least


def test_what_it_may_be_is_said() -> None:
    with pytest.raises(ValueError, match="cpu_activation is 'fp8', must be None or 'int8'"):
        KTMoEWrapper(**SIZES, method="INT8", cpu_activation="fp8")
    with pytest.raises(ValueError, match="those of BF16 are not"):
        KTMoEWrapper(**SIZES, method="BF16", cpu_activation="int8")
    with pytest.raises(ValueError, match="those of BF16 are not"):
        offload(build("mixtral"), "BF16", cpu_activation="int8", progress=False)
    with pytest.raises(ValueError, match="cpu_activation is 'int4'"):
        from_pretrained(TINY, cpu_activation="int4", progress=False)


def test_models_pass_it_on() -> None:
    model = offload(
        build("mixtral"), "INT8", threads=1, dense="torch", cpu_activation="int8", progress=False
    )
    layers = [m.layer for m in model.modules() if isinstance(m, HybridExperts)]
    assert layers and all(layer.activation_bits == 8 for layer in layers)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_a_checkpoint_passes_it_on() -> None:
    model = from_pretrained(TINY, "MXFP4", threads=1, cpu_activation="int8", progress=False)
    layers = [m.layer for m in model.modules() if isinstance(m, HybridExperts)]
    assert layers and all(layer.activation_bits == 8 for layer in layers)
