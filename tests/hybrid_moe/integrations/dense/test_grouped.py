"""DeepSeek-V4's grouped layer, and layers that only look like it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.integrations.transformers.dense.choose import Choice
from hybrid_moe.integrations.transformers.dense.grouped import HybridGroupedLinear, groups_of
from hybrid_moe.integrations.transformers.dense.packing import build, load, torch_weight
from hybrid_moe.integrations.transformers.packing_bar import PackingBar
from tests.cpu_kernels.cases import ACTIVATION_ERROR
from tests.reference import assert_within, evaluate_linear

G, K, N = 3, 64, 80


class OtherOrder(DeepseekV4GroupedLinear):
    """Blocks in turn rather than one behind the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.view(-1, self.n_groups, x.shape[-1])
        return torch.einsum("...gk,ngk->...gn", x, w)


class Scaled(DeepseekV4GroupedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Broken(DeepseekV4GroupedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == K
        return super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_layer_is_proved(device: str) -> None:
    with torch.device(device):
        assert groups_of(DeepseekV4GroupedLinear(K, G * N, G)) == G


def test_what_computes_something_else_is_not_taken() -> None:
    for kind in (OtherOrder, Scaled, Broken):
        assert groups_of(kind(K, G * N, G)) == 0
    plain = nn.Linear(K, G * N)
    plain.n_groups = G  # type: ignore[assignment]
    assert groups_of(plain) == 0
    assert groups_of(DeepseekV4GroupedLinear(K, G * N, G, bias=True)) == 0


def packed(layer: nn.Linear, method: str) -> HybridGroupedLinear:
    model, choice = nn.Module(), Choice(grouped={"o": (layer, G)})
    model.add_module("o", layer)
    hybrid = build(model, choice, DENSE_FORMATS[method], PoolConfig.choose(1))["o"]
    with PackingBar("", shown=False) as bar:
        load("o", hybrid, lambda name: torch_weight(layer, name), 1, bar)
    assert isinstance(hybrid, HybridGroupedLinear)
    return hybrid


@pytest.mark.parametrize("method", DENSE_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_within_the_contract(method: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    layer, fmt = DeepseekV4GroupedLinear(K, G * N, G).bfloat16(), DENSE_FORMATS[method]
    x = torch.randn(*shape, G, K, dtype=torch.bfloat16)
    y = packed(layer, method)(x)
    assert y.shape == (*shape, G, N)
    blocks = layer.weight.detach().float().view(G, N, K)
    for g, block in enumerate(blocks):
        w = fmt.dequantize(*fmt.encode(block.numpy()))
        rows = x[..., g, :].reshape(-1, K).float().numpy()
        expected = evaluate_linear(rows, w, activation_error=ACTIVATION_ERROR[method])
        assert_within(y[..., g, :].reshape(-1, N).float().numpy(), expected)


def test_a_matrix_for_each_block() -> None:
    layer = DeepseekV4GroupedLinear(K, G * N, G).bfloat16()
    hybrid = packed(layer, "BF16")
    matrices = [block.matrix for block in hybrid.blocks]  # type: ignore[union-attr]
    assert all(isinstance(m, PackedMatrix) and m.fmt is BF16 for m in matrices)
    held = [torch.from_numpy(m.unpack().codes.view("int16")).view(torch.bfloat16) for m in matrices]  # type: ignore[union-attr]
    assert torch.equal(torch.cat(held), layer.weight)
