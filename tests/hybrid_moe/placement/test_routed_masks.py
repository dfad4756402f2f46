"""Routing profiles where placements are given: as gpu_experts, and as SGLang's variable."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hybrid_moe.integrations.sglang.gpu_experts import PROFILE, RankExperts, choose
from hybrid_moe.placement.hot_masks import LayerOfExperts, hot_masks
from hybrid_moe.placement.profile import write_profile
from hybrid_moe.placement.routing_profile_file import write_routing_profile
from tests.hybrid_moe.placement.routings import skewed_profile

LAYERS = (1, 2, 4)
MODEL = [LayerOfExperts(layer, 16, 1 << 20) for layer in LAYERS]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routing") / "measured.json"
    write_routing_profile(path, skewed_profile(LAYERS, 16, 4))
    return path


@pytest.mark.parametrize("amount", ["25%", " 25 %", "12MB", "12.9 MiB"])
def test_the_most_used_experts_are_hot(file: Path, amount: str) -> None:
    masks = hot_masks(f"{file}@{amount}", MODEL, num_layers=5)
    assert list(masks) == list(LAYERS)
    hot = np.stack([masks[layer].numpy() for layer in LAYERS])
    assert hot.sum() == 12
    profile = skewed_profile(LAYERS, 16, 4)
    use = profile.decode / 2 + profile.prefill / 2
    # no cold expert is used clearly more than a hot one: decode and prompts differ by chance
    assert use[hot].min() > use[~hot].max() - 40
    assert profile.decode[hot].sum() > 1.5 * profile.decode[:, :4].sum()


def test_all_and_none(file: Path) -> None:
    assert all(mask.all() for mask in hot_masks(f"{file}@100%", MODEL).values())
    assert not any(mask.any() for mask in hot_masks(f"{file}@0%", MODEL).values())


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("", 'size "" must be a positive number'),
        ("many", 'size "many"'),
        ("101%", "must be 100% at most"),
        ("1KB", "too little for one expert of 1.00 MiB"),
    ],
)
def test_amounts_that_are_none(file: Path, amount: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        hot_masks(f"{file}@{amount}", MODEL)


def test_an_amount_is_needed(file: Path) -> None:
    with pytest.raises(ValueError, match=r"a routing profile: say .* measured\.json@25% of all"):
        hot_masks(file, MODEL)


def test_another_model_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"measured\.json was measured on another model"):
        hot_masks(f"{file}@25%", [LayerOfExperts(layer, 8, 1) for layer in LAYERS])
    with pytest.raises(ValueError, match="3 layers from 1 to 4, not 2 layers"):
        hot_masks(f"{file}@25%", MODEL[:2])


def test_a_placement_with_such_a_name_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "hot@25%"
    write_profile(path, {1: [3], 2: [], 4: [0]})
    assert hot_masks(path, MODEL)[1].nonzero().flatten().tolist() == [3]
    with pytest.raises(FileNotFoundError, match="which is no file"):
        hot_masks(f"{tmp_path}/other.json@25%", MODEL)


def test_sglang_takes_a_number_for_each_layer_on_average(file: Path) -> None:
    environment = {PROFILE: str(file)}
    chosen = {layer: choose(layer, 16, 4, environment) for layer in LAYERS}
    masks = hot_masks(f"{file}@25%", MODEL)
    for layer in LAYERS:
        assert list(chosen[layer].hot) == masks[layer].nonzero().flatten().tolist()
    assert len({experts.count for experts in chosen.values()}) > 1
    assert choose(1, 16, None, environment).count == 0
    with pytest.raises(ValueError, match=r"17 experts of each layer .* have 0 to 16"):
        choose(1, 16, 17, environment)
    with pytest.raises(ValueError, match="has no layer 3"):
        choose(3, 16, 4, environment)


def test_sglang_divides_experts_as_a_placement_says(tmp_path: Path) -> None:
    path = tmp_path / "hot.json"
    write_profile(path, {0: [5, 1, 7], 1: [2]}, {0: [[7], [5, 1]]})
    hot = choose(0, 16, None, {PROFILE: str(path)})
    assert hot.hot == (1, 5, 7)
    assert [RankExperts.of(hot, 0, rank, 2).hot.hot for rank in range(2)] == [(7,), (1, 5)]
    assert RankExperts.of(hot, 0, 0, 1).hot.hot == (1, 5, 7)
    plain = choose(1, 16, None, {PROFILE: str(path)})
    assert {RankExperts.of(plain, 1, rank, 2).hot.hot for rank in range(2)} == {(2,), ()}
    with pytest.raises(ValueError, match="layer 0 is for 2 GPUs, but there are 3"):
        RankExperts.of(hot, 0, 0, 3)
