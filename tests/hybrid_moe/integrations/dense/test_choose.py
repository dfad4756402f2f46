"""Which linear layers are taken, by a model's structure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hybrid_moe.formats.activation import Activation
from hybrid_moe.integrations.transformers.dense.choose import Choice, choose
from hybrid_moe.integrations.transformers.experts_module import (
    ExpertsSpec,
    experts_spec,
    find_experts,
)
from tests.hybrid_moe.integrations.dense.wide_models import WIDE, build_wide
from tests.hybrid_moe.integrations.test_loading_parts import composite

H, E = 96, 64


def chosen(model: nn.Module, **options: Any) -> Choice:
    specs = {name: experts_spec(m, name) for name, m in find_experts(model).items()}
    return choose(model, specs, **options)


def layers(names: Any) -> set[str]:
    """Names without what stands before the layer."""
    return {name.removeprefix("model.").removeprefix("layers.") for name in names}


TAKEN: dict[str, tuple[set[str], set[str], set[str]]] = {
    "qwen3_moe": (
        {f"{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"} | {"lm_head"},
        {"1.mlp"},
        set(),
    ),
    "deepseek_v3": (
        {
            f"{n}.self_attn.{p}"
            for n in (0, 1)
            for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        }
        | {"lm_head"},
        {"0.mlp", "1.mlp.shared_experts"},
        set(),
    ),
    "afmoe": (
        {f"{n}.self_attn.{p}_proj" for n in (0, 1) for p in ("q", "k", "v", "o", "gate")}
        | {"lm_head"},
        {"0.mlp", "1.mlp.shared_experts"},
        {"1.mlp.router.gate"},
    ),
    "qwen3_next": (
        {f"1.self_attn.{p}_proj" for p in "qkvo"}
        | {"0.linear_attn.in_proj_qkvz", "0.linear_attn.out_proj", "lm_head"},
        {"0.mlp.shared_expert", "1.mlp.shared_expert"},
        {"0.linear_attn.in_proj_ba", "0.mlp.shared_expert_gate", "1.mlp.shared_expert_gate"},
    ),
}
"""Layers, gated MLPs, and what stays with torch."""


@pytest.mark.parametrize("family", TAKEN)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_families(family: str, device: str) -> None:
    if device == "cpu":
        model = build_wide(family)
    else:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(WIDE[family]())
    choice = chosen(model)
    found = tuple(map(layers, (choice.linears, choice.mlps, choice.kept)))
    assert found == TAKEN[family]
    assert choice.tied == ({"lm_head": "model.embed_tokens"} if family == "qwen3_moe" else {})


def test_only_the_language_model_of_a_larger_one() -> None:
    """Its vision tower has layers that are large enough, and what stays is listed with bytes."""
    model = composite()
    large = [
        name
        for name, module in model.named_modules()
        if "visual" in name and type(module) is nn.Linear and module.out_features >= 64
    ]
    choice = chosen(model)
    assert large and choice.linears
    assert not [name for name in (*choice.weights(), *choice.kept) if "visual" in name]
    assert "model.language_model.layers.*.mlp.shared_expert_gate (small, 0.4 KiB)" in (
        choice.report()
    )


class Block(nn.Module):
    """A block around experts, with what stands beside them."""

    def __init__(self, **beside: nn.Module) -> None:
        super().__init__()
        self.experts = nn.Identity()
        for name, module in beside.items():
            setattr(self, name, module)


def spec() -> ExpertsSpec:
    return ExpertsSpec("experts", E, H, 64, Activation(), False, True, False)


def linear(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, **options)


def chain(*sizes: int) -> nn.Module:
    return nn.Sequential(*(linear(*pair) for pair in pairwise(sizes)))


def named(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


ROUTERS = {
    "a layer": (Block(gate=linear(H, E)), {"gate"}),
    "a layer in a module": (Block(router=named(layer=linear(H, E))), {"router.layer"}),
    "more outputs than experts": (Block(router=named(layer=linear(H, 2 * E))), {"router.layer"}),
    "several layers": (Block(router=chain(H, 64, 64, E)), {"router.0", "router.1", "router.2"}),
    "an MLP of as many": (Block(shared=chain(H, E, H)), set()),
    "latent experts": (Block(fold=linear(2 * H, H), unfold=linear(H, 2 * H)), set()),
    "attention beside": (
        Block(attention=named(k=linear(H, E), o=linear(H, H)), router=named(proj=linear(H, E))),
        {"router.proj"},
    ),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_routers_by_what_they_give(case: str) -> None:
    block, routers = ROUTERS[case]
    choice = choose(block, {"experts": spec()})
    assert {name for name, (_, reason) in choice.kept.items() if reason == "router"} == routers
    every = {name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert every == set(choice.linears) | set(choice.kept)


class Special(nn.Linear):
    """A subclass, which may compute something else."""


class Reader(nn.Module):
    """Multiplies by a layer's weight, as Jamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.dt_proj, self.other = linear(H, 128), linear(H, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dt_proj.weight @ x.t() + self.other(x).t()


def hooked() -> nn.Linear:
    module = linear(H, 128)
    module.register_forward_hook(lambda *_: None)
    return module


def replaced() -> nn.Linear:
    module = linear(H, 128)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


KEPT = {
    "rows": (linear(H, 63), "small"),
    "inputs": (linear(H + 1, 128), "97 inputs are no multiple of 32"),
    "dtype": (linear(H, 128).double(), "weights of torch.float64"),
    "class": (Special(H, 128), "Special"),
    "hook": (hooked(), "has hooks"),
    "forward": (replaced(), "has hooks"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stays_with_torch(case: str) -> None:
    layer, reason = KEPT[case]
    block = Block(other=named(kept=layer, taken=linear(H, 128), out=linear(H, H)))
    choice = choose(block, {"experts": spec()})
    assert {name: why for name, (_, why) in choice.kept.items()} == {"other.kept": reason}
    assert set(choice.linears) == {"other.taken", "other.out"}


def test_weights_that_are_multiplied_by_are_not_unpacked_each_time() -> None:
    block = Block(mixer=Reader(), other=named(out=linear(H, H)))
    block.mixer.add_module("out", linear(H, H))  # type: ignore[union-attr]
    choice = choose(block, {"experts": spec()})
    assert {n: why for n, (_, why) in choice.kept.items()} == {
        "mixer.dt_proj": "Reader reads its weight"
    }


def test_what_is_float32_in_another_model_stays_so() -> None:
    block = Block(other=named(a=linear(H, 128), b=linear(H, H), c=linear(H, 128))).bfloat16()
    block.other.a.float()  # type: ignore[union-attr]
    choice = choose(block, {"experts": spec()}, lambda name: name == "other.c.weight")
    assert {n: why for n, (_, why) in choice.kept.items()} == {
        "other.a": "kept in float32", "other.c": "kept in float32",
    }  # fmt: skip
    assert set(choose(block.float(), {"experts": spec()}).linears) == {
        "other.a", "other.b", "other.c",
    }  # fmt: skip


def test_adapters_are_neither_taken_nor_mentioned() -> None:
    wrapped = named(
        base_layer=linear(H, H), lora_A=named(default=linear(H, 64)), lora_B=named(d=linear(64, H))
    )
    choice = choose(Block(other=wrapped), {"experts": spec()})
    assert set(choice.linears) == {"other.base_layer"} and not choice.kept


@pytest.mark.parametrize("kind", ["plain", "scaled", "max_norm", "two"])
def test_a_shared_weight_is_taken_with_a_plain_embedding_alone(kind: str) -> None:
    class Scaled(nn.Embedding):
        pass

    embedding = Scaled(128, H) if kind == "scaled" else nn.Embedding(128, H)
    if kind == "max_norm":
        embedding.max_norm = 1.0
    head = linear(H, 128)
    head.weight = embedding.weight
    block = Block(other=named(embed=embedding, head=head, out=linear(H, H)))
    if kind == "two":
        second = linear(H, 128)
        second.weight = head.weight
        block.other.add_module("second", second)  # type: ignore[union-attr]
    choice = choose(block, {"experts": spec()})
    if kind == "plain":
        assert choice.tied == {"other.head": "other.embed"} and "other.head" in choice.linears
    else:
        assert not choice.tied and "shares its weight" in choice.kept["other.head"][1]


def test_an_mlp_can_be_split_and_a_layer_be_left() -> None:
    choice = chosen(build_wide("deepseek_v3"))
    name = "model.layers.0.mlp"
    everything = set(choice.weights())
    choice.keep(f"{name}.up_proj", "of the test")
    assert name not in choice.mlps
    assert {f"{name}.gate_proj", f"{name}.down_proj"} <= set(choice.linears)
    assert set(choice.weights()) == everything - {f"{name}.up_proj"}
    assert choice.kept[f"{name}.up_proj"][1] == "of the test"
    assert f"1 model.layers.*.mlp.up_proj (of the test, {96 * 64 * 2 / 1024:.1f} KiB)" in (
        choice.report()
    )
