"""The trained model in the repository: real text through real experts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import hybrid_moe
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.integrations.transformers.hit_rates import hit_rates
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from tests.reference import assert_within, evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_moe"
MODEL = EXAMPLE / "model"
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered the rightful property of some one or other of "
    "their daughters."
)


TIE = 0.5
"""Logits this near each other may change places: four roundings of a BF16 logit near 16. Hot
experts take activations in BF16, the CPU's kernels in 15-bit fixed point."""


def load(gpu_experts: float | None = None) -> Any:
    backend = None if gpu_experts is None else "torch"
    return hybrid_moe.from_pretrained(
        MODEL, method="MXFP4", progress=False, gpu_experts=gpu_experts, gpu_backend=backend
    ).eval()


@pytest.fixture(scope="module")
def cold() -> Any:
    """All experts on the CPU."""
    return load()


@pytest.fixture(scope="module", params=[None, 0.5], ids=["cpu", "split"])
def model(request: pytest.FixtureRequest, cold: Any) -> Any:
    return cold if request.param is None else load(request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokens: torch.Tensor = AutoTokenizer.from_pretrained(MODEL)(TEXT, return_tensors="pt").input_ids
    return tokens


def _experts(layer: int) -> list[np.ndarray]:
    """gate, up and down [E, N, K] of a layer, float64, from the checkpoint's bytes."""
    tensors = load_file(MODEL / "model.safetensors")

    def stack(projection: str) -> np.ndarray:
        matrices = []
        for expert in range(16):
            key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
            scale = tensors[f"{key}_scale"].view(torch.uint8).numpy()
            matrices.append(MXFP4.dequantize(tensors[key].view(torch.uint8).numpy(), scale))
        return np.stack(matrices).astype(np.float64)

    return [stack(projection) for projection in ("gate", "up", "down")]


def test_every_layer_keeps_the_numerics_contract(model: Any, ids: torch.Tensor) -> None:
    """What the experts make of real activations, against float64 on dequantized weights."""
    calls: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[name] = (*args, output)

        return hook

    modules = {n: m for n, m in model.named_modules() if isinstance(m, HybridExperts)}
    assert len(modules) == 4
    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    with torch.inference_mode():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    used = set()
    for index, name in enumerate(modules):
        x, top, weights, output = (tensor.flatten(0, -2) for tensor in calls[name])
        expected = evaluate(
            x.double().numpy(), top.numpy(), weights.double().numpy(), *_experts(index)
        )
        # trained activations have outliers, so the random model of errors does not apply
        assert_within(output.double().numpy(), expected, random=False)
        error = output.double().numpy() - expected.value
        assert np.linalg.norm(error) <= 0.003 * np.linalg.norm(expected.value)
        used |= {(index, int(expert)) for expert in top.unique()}
    assert len(used) == 4 * 16, "some experts saw no token: the text is too short for this test"


def test_it_reads_english(cold: Any, ids: torch.Tensor) -> None:
    """Far better than chance (3,072 tokens), worse on the same words in random order."""

    def nats(tokens: torch.Tensor) -> float:
        with torch.inference_mode():
            logits = cold(input_ids=tokens).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))

    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert nats(ids) < 5.0 < nats(shuffled)


def test_cached_decoding_equals_one_pass(cold: Any, ids: torch.Tensor) -> None:
    """Greedy tokens: a token at a time, and each from the whole text before it."""
    generated = cold.generate(ids[:, :32], max_new_tokens=12, do_sample=False)
    for length in range(32, generated.shape[1]):
        with torch.inference_mode():
            logits = cold(input_ids=generated[:, :length]).logits[0, -1].float()
        chosen = logits[generated[0, length]]
        # attention in BF16 differs between the two by a rounding or two of a logit near 16
        assert chosen >= logits.max() - 0.25


@pytest.mark.parametrize("gpu_experts", [0.25, 0.5, 1.0])
def test_experts_in_slots_say_what_the_cpu_s_say(
    gpu_experts: float, cold: Any, ids: torch.Tensor
) -> None:
    split = load(gpu_experts)
    with torch.inference_mode():
        expected, found = (m(input_ids=ids).logits[0].float() for m in (cold, split))
    # each of four layers may be off by 0.003 here and there, see docs/numerics.md
    assert (found - expected).norm() <= 4 * 2 * 0.003 * expected.norm()
    generated = split.generate(ids[:, :32], max_new_tokens=16, do_sample=False)
    with torch.inference_mode():
        logits = cold(input_ids=generated).logits[0, 31:-1].float()
    chosen = logits.gather(1, generated[0, 32:, None])[:, 0]
    assert (chosen >= logits.max(1).values - TIE).all()
    rates = hit_rates(split)
    assert rates is not None and len(rates.layers) == 4
    hot = sum(count for count, _ in rates.layers.values())
    assert 0 < hot <= sum(pairs for _, pairs in rates.layers.values())
    assert (gpu_experts == 1.0) == all(count == pairs for count, pairs in rates.layers.values())


def test_fake_quantisation_of_the_training_is_the_format() -> None:
    spec = importlib.util.spec_from_file_location("fake_quant", EXAMPLE / "fake_quant.py")
    assert spec is not None and spec.loader is not None
    fake_quant: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake_quant)
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-20, 20, (3, 40, 8, 1), generator=generator).float())
    weight = (torch.randn(3, 40, 8, 32, generator=generator) * scale).reshape(3, 40, 256)
    fake_quant.assert_equals_format(weight)
