"""Gated MLPs: which modules are, and what they compute as one job."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.integrations.transformers.dense.mlp import GatedMLP, HybridMLP, gated_mlp
from hybrid_moe.integrations.transformers.dense.packing import load, torch_weight
from hybrid_moe.integrations.transformers.packing_bar import PackingBar
from tests.cpu_kernels.cases import ACTIVATION_ERROR
from tests.reference import assert_within, evaluate

H, I = 64, 96


class Gated(nn.Module):
    """What families call it, with every option that some of them have."""

    def __init__(
        self,
        limit: float = 0.0,
        alpha: float = 0.0,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.limit, self.alpha, self.names = limit, alpha, names
        for name, sizes in zip(names, ((H, I), (H, I), (I, H)), strict=True):
            setattr(self, name, nn.Linear(*sizes, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return self.combine(x, gate(x), up(x), down)

    def combine(self, x: Any, gate: Any, up: Any, down: Any) -> Any:
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return down(gate * torch.sigmoid((self.alpha or 1) * gate) * (up + bool(self.alpha)))


class Gelu(Gated):
    def combine(self, x: Any, gate: Any, up: Any, down: Any) -> Any:
        return down(nn.functional.gelu(gate) * up)


class Residual(Gated):
    def combine(self, x: Any, gate: Any, up: Any, down: Any) -> Any:
        return x.new_ones(1) + down(nn.functional.silu(gate) * up)


class OtherInput(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x + 1))


class HiddenClamp(Gated):
    def combine(self, x: Any, gate: Any, up: Any, down: Any) -> Any:
        return down(nn.functional.silu(gate.clamp(max=30.0)) * up)


class Norm(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H)


class Wide(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(I, H + 32)


class TwoInputs(Gated):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + y


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamped": {"limit": 0.5},
    "slope": {"alpha": 1.702, "limit": 0.5},
    "biased": {"bias": True},
    "named otherwise": {"names": ("w3", "w1", "w2")},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recognised(options: str, device: str) -> None:
    given = OPTIONS[options]
    with torch.device(device):
        found = gated_mlp(Gated(**given))
    assert found is not None
    assert found.names == given.get("names", ("gate_proj", "up_proj", "down_proj"))
    limit, alpha = given.get("limit", 0.0), given.get("alpha", 0.0)
    assert (found.activation.limit, found.activation.alpha) == (limit, alpha)
    assert (found.hidden, found.intermediate, found.biased) == (H, I, given.get("bias", False))


@pytest.mark.parametrize(
    "kind",
    [Gelu, Residual, OtherInput, HiddenClamp, Norm, Wide, TwoInputs],
    ids=lambda k: k.__name__,
)
def test_not_recognised(kind: type[Gated]) -> None:
    assert gated_mlp(kind()) is None


def test_a_module_with_hooks_or_another_forward_is_left_in_parts() -> None:
    hooked, replaced = Gated(), Gated()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert gated_mlp(hooked) is None and gated_mlp(replaced) is None


def found(module: Gated) -> GatedMLP:
    mlp = gated_mlp(module)
    assert mlp is not None
    return mlp


def packed(module: Gated, method: str = "BF16", dtype: torch.dtype = torch.bfloat16) -> HybridMLP:
    mlp = found(module)
    hybrid = HybridMLP(mlp, DENSE_FORMATS[method], PoolConfig.choose(1), "model.mlp (Gated)", dtype)
    with PackingBar("", shown=False) as bar:
        layers = {f"mlp.{name}": linear for name, linear in mlp.linears.items()}
        load("mlp", hybrid, lambda name: torch_weight(layers[name], name), 1, bar)
    return hybrid


@pytest.mark.parametrize("method", DENSE_FORMATS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(H,), (1, H), (2, 5, H), (0, H)], ids=str)
def test_within_the_contract(method: str, options: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    given, fmt = OPTIONS[options], DENSE_FORMATS[method]
    module = Gated(**given).bfloat16()
    x = torch.randn(shape, dtype=torch.bfloat16)
    y = packed(module, method)(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    weights, biases = {}, {}
    for role, name in zip(("gate", "up", "down"), module.names, strict=True):
        linear = getattr(module, name)
        codes = fmt.encode(linear.weight.detach().float().numpy())
        weights[role] = fmt.dequantize(*codes)[None]
        if linear.bias is not None:
            biases[f"{role}_bias"] = linear.bias.detach().float().numpy()[None]
    rows = x.float().reshape(-1, H).numpy()
    expected = evaluate(
        rows, np.zeros((len(rows), 1), np.int64), np.ones((len(rows), 1), np.float32),
        **weights, **biases, limit=given.get("limit", 0.0), alpha=given.get("alpha", 0.0),
        activation_error=ACTIVATION_ERROR[method],
    )  # fmt: skip
    assert_within(y.float().reshape(-1, H).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded_to_bf16(dtype: torch.dtype) -> None:
    hybrid = packed(Gated().to(dtype), dtype=dtype)
    x = torch.randn(3, H, dtype=dtype)
    y = hybrid(x)
    assert y.dtype == dtype and torch.equal(y.bfloat16(), hybrid(x.bfloat16()))


def test_bits_do_not_depend_on_the_batch() -> None:
    hybrid, x = packed(Gated().bfloat16()), torch.randn(70, H, dtype=torch.bfloat16)
    together = hybrid(x)
    assert torch.equal(torch.stack([hybrid(row) for row in x]), together)


def test_threads_with_batches_of_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that comes while another one makes room for more tokens."""
    hybrid, x = packed(Gated().bfloat16()), torch.randn(5, H, dtype=torch.bfloat16)
    expected, ones, meanwhile = hybrid(x[:3]), torch.ones, []

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        monkeypatch.setattr(torch, "ones", ones)
        meanwhile.append(hybrid(x[:4]))
        return ones(*args, **kwargs)

    monkeypatch.setattr(torch, "ones", interrupted)
    assert torch.equal(hybrid(x)[:3], expected)
    assert torch.equal(meanwhile[0][:3], expected)


def test_compiled_without_a_break() -> None:
    hybrid, x = packed(Gated().bfloat16()), torch.randn(2, 3, H, dtype=torch.bfloat16)
    compiled = torch.compile(hybrid, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), hybrid(x))


def test_refusals() -> None:
    module = Gated().bfloat16()
    hybrid = packed(module)
    x = torch.randn(2, H, dtype=torch.bfloat16)
    empty = HybridMLP(found(module), BF16, PoolConfig.choose(1), "model.mlp", torch.bfloat16)
    with pytest.raises(RuntimeError, match="no expert of this layer has been loaded"):
        empty(x)
    with pytest.raises(ValueError, match=r"model\.mlp \(Gated\): hidden states of size 96"):
        hybrid(torch.randn(2, 96))
    with pytest.raises(RuntimeError, match="inference only"):
        hybrid(x.requires_grad_()).sum().backward()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(hybrid)
    with pytest.raises(RuntimeError, match=r"gate_proj\.weight: the weights of model\.mlp"):
        hybrid.load_state_dict(module.state_dict(), strict=False)
    assert hybrid.load_state_dict({})


def test_a_copy_shares_the_strips() -> None:
    hybrid, x = packed(Gated().bfloat16()), torch.randn(2, H, dtype=torch.bfloat16)
    expected, twin = hybrid(x), copy.deepcopy(hybrid)
    assert twin.layer is hybrid.layer
    del hybrid
    assert torch.equal(twin(x), expected)
    assert "hidden=64, intermediate=96, BF16" in repr(twin)
