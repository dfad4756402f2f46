"""The price of deferral is measured on what decode does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hybrid_moe.runtime.deferral import DeferralChain
from tests.hybrid_moe.cases import E, H, K, Weights, wrapper

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_moe"


class Experts(torch.nn.Module):
    """A layer without deferral, as the experts module of a model."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.wrapper = weights.load(wrapper())

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.wrapper.forward(hidden, ids, weights)


@pytest.mark.parametrize("depth", range(K + 1))
def test_tokens_of_a_text_are_those_of_decode(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers with all tokens at once, and token by token through a chain that defers."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    sys.modules.pop("corpus", None)
    from deferral_price import Carried, Deferring

    each = [Weights.random(seed=seed) for seed in range(3)]
    chain, carried, tokens = DeferralChain(), Carried(), 12
    decode = [
        weights.load(
            wrapper(layer_idx=at, max_deferred_experts_per_token=depth, deferral_chain=chain)
        )
        for at, weights in enumerate(each)
    ]
    whole = [Deferring(Experts(w), depth if at < 2 else 0, carried) for at, w in enumerate(each)]
    rng = torch.Generator().manual_seed(1)
    for at, layer in enumerate(whole):
        layer.hidden = torch.randn(tokens, H, generator=rng).bfloat16()
        layer.ids = torch.rand(tokens, E, generator=rng).argsort(1)[:, :K].contiguous()
        layer.weights = torch.rand(tokens, K, generator=rng)
        layer.output = layer(layer.hidden, layer.ids, layer.weights)
        assert (carried.sum is None) == (depth == 0 or at == 2)
    for token in range(tokens):
        one = slice(token, token + 1)
        for w, layer in zip(decode, whole, strict=True):
            step = w.forward(layer.hidden[one], layer.ids[one], layer.weights[one])
            # sums of BF16 parts, rounded in another order
            assert torch.allclose(step.float(), layer.output[one].float(), rtol=2e-2, atol=2e-2)


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from deferral_price import speed

    assert speed(4, 0, 48) == 1
    # a quarter of the CPU's 70 % is under attention
    assert speed(4, 1, 10_000) == pytest.approx(1 / (1 - 0.7 / 4), rel=1e-3)
    # attention hides no more than it takes: the CPU is busy all the time
    assert speed(4, 3, 10_000) == pytest.approx(1 / 0.7, rel=1e-3)
