"""W8A8 prefill: what `gpu_activation="fp8"` computes and loses, and where it does not apply."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid_moe import KTMoEWrapper
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.gpu_kernels.slot_experts import PREFILL_TOKENS, SlotExperts
from tests.cpu_kernels.cases import decode
from tests.gpu.slots import Slots, random_slots
from tests.hybrid_moe.integrations.test_split_experts import HALF
from tests.hybrid_moe.tiny_models import build

H, I, E, K, T = 320, 160, 4, 2, PREFILL_TOKENS
"""Neither size is whole blocks of 128."""


def _fp8(x: np.ndarray) -> np.ndarray:
    """W8A8's rounding, block by block: codes of ml_dtypes, the smallest power of two that fits."""
    out = np.empty_like(x)
    for at in range(0, x.shape[1], 128):
        block = x[:, at : at + 128]
        amax = np.maximum(np.abs(block).max(1, keepdims=True), 1e-4)
        scale = 2.0 ** np.ceil(np.log2(amax / 448))
        out[:, at : at + 128] = (block / scale).astype(ml_dtypes.float8_e4m3fn) * scale
    return out


def _layer(slots: Slots, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, fp8: bool) -> Any:
    """The layer in float64, [T, H]."""
    out = np.zeros((len(x), H))
    rounded = _fp8 if fp8 else lambda values: values
    for e, expert in enumerate(slots.experts):
        gate, up, down = (
            decode(slots.layout.formats.down, m).astype(np.float64)
            for m in (expert.gate, expert.up, expert.down)
        )
        token, place = np.nonzero(ids == e)
        g, u = (rounded(x[token]) @ w.T for w in (gate, up))
        h = (g / (1 + np.exp(-g)) * u).astype(ml_dtypes.bfloat16).astype(np.float64)
        np.add.at(out, token, weights[token, place, None] * (rounded(h) @ down.T))
    return out


def _batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, H, generator=rng).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(tokens)])
    return x, ids, torch.rand(tokens, K, generator=rng) + 0.1


def _compute(slots: Slots, tokens: int, fp8: bool) -> torch.Tensor:
    experts = SlotExperts(
        slots.layout, Activation(), E, E, torch.device("cpu"), "torch", fp8_prefill=fp8
    )
    experts.memory.copy_(torch.from_numpy(slots.memory))
    experts.slot_of.copy_(torch.arange(E))
    x, ids, weights = _batch(tokens)
    return experts.combine(experts.rows(x, ids), ids, weights, None, experts.slot_of)


def _error(found: Any, expected: Any) -> float:
    """Root of mean squares, relative."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_prefill_is_w8a8_and_loses_five_percent() -> None:
    """Three roundings of 2.6 % each, of x and of h and again through gate times up, add up as
    squares. What float32 makes of h moves a few of its codes; the rest are those of float64."""
    slots = random_slots(MXFP4, H, I, E, parts=(1, 1))
    x, ids, weights = (values.double().numpy() for values in _batch(T))
    found = _compute(slots, T, fp8=True).double().numpy()
    exact = _layer(slots, x, ids, weights, fp8=False)
    assert _error(found, _layer(slots, x, ids, weights, fp8=True)) < 0.006
    assert 0.04 < _error(found, exact) < 0.05
    assert _error(_compute(slots, T, fp8=False).double().numpy(), exact) < 0.005


def test_smaller_batches_keep_their_bits() -> None:
    slots = random_slots(MXFP4, H, I, E)
    assert torch.equal(_compute(slots, T - 1, fp8=True), _compute(slots, T - 1, fp8=False))
    assert not torch.equal(_compute(slots, T, fp8=True), _compute(slots, T, fp8=False))


def test_a_wrapper_passes_it_on() -> None:
    rng = torch.Generator().manual_seed(1)
    shapes = (E, I, H), (E, I, H), (E, H, I)
    gate, up, down = (torch.randn(shape, generator=rng) * 0.1 for shape in shapes)
    results = {}
    for activation in (None, "fp8"):
        layer = KTMoEWrapper(
            0, E, K, H, I, torch.tensor([True, True, False, True]), 1, method="MXFP4",
            gpu_backend="torch", gpu_device="cpu", gpu_activation=activation,
        )  # fmt: skip
        layer.load_weights_from_tensors(gate, up, down)
        results[activation] = [
            layer.forward(*_batch(tokens), None).float().numpy() for tokens in (T - 1, T)
        ]
        layer.close()
    (few, many), (its_few, its_many) = results[None], results["fp8"]
    assert np.array_equal(few, its_few) and 0.02 < _error(its_many, many) < 0.06


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ValueError, match="gpu_activation needs a gpu_backend"):
        KTMoEWrapper(0, E, K, H, I, gpu_activation="fp8")
    with pytest.raises(ValueError, match="gpu_activation is 'int8'"):
        KTMoEWrapper(0, E, K, H, I, gpu_backend="torch", gpu_activation="int8")


def test_models_pass_it_on() -> None:
    from hybrid_moe import offload

    with pytest.raises(ValueError, match="gpu_activation is 'fp8', but no expert"):
        offload(build("mixtral"), gpu_activation="fp8", progress=False)
    with pytest.raises(ValueError, match="gpu_activation is 'int4'"):
        offload(build("mixtral"), gpu_activation="int4", progress=False, **HALF)
    model = offload(build("mixtral"), dense="torch", gpu_activation="fp8", progress=False, **HALF)
    layer = model.model.layers[0].mlp.experts.layer
    assert layer.wrapper._hot.options.fp8_prefill
