"""Which layers of an SGLang process are one model; no SGLang."""

from __future__ import annotations

import pytest

from hybrid_moe.integrations.sglang.model_chain import TargetModel
from tests.hybrid_moe.members import Layer


def build(target: TargetModel, *indices: int) -> list[Layer]:
    layers = []
    for index in indices:
        layers.append(Layer(index))
        target.chain_of(index).join(layers[-1])
    return layers


def test_ascending_layers_are_one_model() -> None:
    target = TargetModel()
    kept = build(target, 3, 4, 7)
    chain = target.chain_of(8)
    assert [chain.after(layer.layer_idx) for layer in kept] == [4, 7, None]


def test_a_model_that_is_built_anew_has_a_chain_of_its_own() -> None:
    """While the old one lives, wholly or in part, and when it is gone."""
    target = TargetModel()
    old = build(target, 0, 1, 2)
    first = target.chain_of(5)
    new = build(target, 0, 1)
    second = target.chain_of(2)
    assert first is not second
    assert [first.after(0), second.after(0), second.after(1)] == [1, 1, None]
    del old[0], new[:]
    newest = build(target, 0, 2)
    assert target.chain_of(3).after(0) == 2 and len(newest) == 2
    assert first.after(0) == 1


def test_a_model_has_one_stream_of_prompts() -> None:
    target, environment = TargetModel(), {"HYBRID_MOE_STREAM_PREFILL": "1GiB"}
    target.chain_of(0)
    assert target.prefill_stream({}) is None
    first = target.prefill_stream(environment)
    target.chain_of(1)
    assert first is not None and target.prefill_stream(environment) is first
    target.chain_of(0)  # a model that is built anew
    assert target.prefill_stream(environment) is not first
    with pytest.raises(ValueError, match='HYBRID_MOE_STREAM_PREFILL: size "much"'):
        target.prefill_stream({"HYBRID_MOE_STREAM_PREFILL": "much"})
