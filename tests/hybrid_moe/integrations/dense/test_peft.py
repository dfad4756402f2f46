"""PEFT over packed layers: LoRA on attention, whose base layers are ours."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hybrid_moe.integrations.dense.packed_models import pack
from tests.hybrid_moe.tiny_models import build, greedy, logits, prompt

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "o_proj"]


def adapted(model: Any, **options: Any) -> Any:
    """`model` with adapters that matter, the same ones for every model."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.0, **options)
    model = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * size)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Plain Transformers and PEFT, and packed layers and PEFT."""
    plain = build("mixtral")
    return adapted(copy.deepcopy(plain)), adapted(pack(plain))


def test_adapters_give_what_they_give_on_plain_layers(models: tuple[Any, Any]) -> None:
    plain, packed = models
    got, want = logits(packed, prompt()), logits(plain, prompt())
    with packed.disable_adapter():
        bare = logits(packed, prompt())
    assert (got - want).abs().max() <= 8 * 2**-8 * want.abs().max()
    assert (got - bare).abs().max() > 0.2 * want.abs().max()
    assert greedy(packed, prompt()) == greedy(plain, prompt())


def test_the_base_layer_is_ours(models: tuple[Any, Any]) -> None:
    layer = models[1].get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert type(layer.base_layer).__name__ == "HybridLinear"


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_by_name(models: tuple[Any, Any], safe: bool) -> None:
    packed = models[1]
    want = logits(packed, prompt())
    message = r"layers\.0\.self_attn\.q_proj.*packed by hybrid_moe.*merge adapters"
    with pytest.raises(RuntimeError, match=message):
        packed.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(packed, prompt()), want)


def test_unloading_gives_the_packed_model_back(models: tuple[Any, Any]) -> None:
    packed = copy.deepcopy(models[1])
    bare = packed.unload()
    assert not any("lora" in name for name, _ in bare.named_modules())
    assert greedy(bare, prompt()) == greedy(pack(build("mixtral")), prompt())


def test_adapters_are_saved_and_loaded(models: tuple[Any, Any], tmp_path: Path) -> None:
    plain, packed = models
    packed.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pack(build("mixtral")), tmp_path).eval()
    assert torch.equal(logits(again, prompt()), logits(packed, prompt()))
    there = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()
    assert torch.equal(logits(there, prompt()), logits(plain, prompt()))


def test_training_is_refused_by_name() -> None:
    model = adapted(pack(build("mixtral"))).train()
    loss = model(input_ids=prompt(), labels=prompt()).loss
    with pytest.raises(RuntimeError, match="hybrid_moe have no gradient: inference only"):
        loss.backward()


def test_dora_reads_the_weight(caplog: pytest.LogCaptureFixture) -> None:
    """Its norms come from the base weight, which is unpacked."""
    plain = build("mixtral")
    want = logits(adapted(copy.deepcopy(plain), use_dora=True), prompt())
    got = logits(adapted(pack(plain), use_dora=True), prompt())
    assert (got - want).abs().max() <= 8 * 2**-8 * want.abs().max()
    assert any(re.search("q_proj: its packed weight is read", r.message) for r in caplog.records)


def test_initialisations_that_change_the_base_are_refused() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(RuntimeError, match=r"q_proj.* packed by hybrid_moe"):
        peft.get_peft_model(pack(build("mixtral")), config)
