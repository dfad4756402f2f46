"""Clauses of loading weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .kit import E, H, I, Kit, Weights, assert_close, mask_of, write_checkpoint

MAPS = {
    "identity": torch.arange(E),
    "reversed": torch.arange(E).flip(0),
    "rotated": torch.arange(E).roll(3),
    "shuffled": torch.tensor([5, 2, 7, 0, 1, 6, 3, 4]),
    "repeating_an_expert": torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]),
}


@pytest.mark.parametrize("name", MAPS)
def test_map_names_the_checkpoints_expert_of_each_id(kit: Kit, name: str) -> None:
    wrapper, batch = kit.load(MAPS[name]), kit.batch(6)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, mapping=MAPS[name]))


def test_mask_is_by_id_and_not_by_the_checkpoints_expert(kit: Kit) -> None:
    mapping = MAPS["shuffled"]
    wrapper, batch = kit.load(mapping, gpu_experts_mask=mask_of(0, 6)), kit.batch(6)
    expected = kit.weights[0].forward(batch, mapping=mapping, skip={0, 6})
    assert_close(kit.forward(wrapper, batch), expected)


def test_map_is_not_kept(kit: Kit) -> None:
    mapping = MAPS["reversed"].clone()
    wrapper, batch = kit.load(mapping), kit.batch(3)
    mapping.fill_(0)
    expected = kit.weights[0].forward(batch, mapping=MAPS["reversed"])
    assert_close(kit.forward(wrapper, batch), expected)


def test_each_layer_has_its_own_weights(kit: Kit) -> None:
    batch = kit.batch(3)
    wrappers = [kit.load(layer_idx=layer) for layer in range(3)]
    for layer, wrapper in enumerate(wrappers):
        assert_close(kit.forward(wrapper, batch), kit.weights[layer].forward(batch))


def test_layers_may_be_loaded_in_any_order(kit: Kit) -> None:
    batch = kit.batch(3)
    wrappers = {layer: kit.make(layer_idx=layer) for layer in range(3)}
    for layer in (2, 0, 1):
        wrappers[layer].load_weights(torch.arange(E))
    for layer, wrapper in wrappers.items():
        assert_close(kit.forward(wrapper, batch), kit.weights[layer].forward(batch))


def test_two_checkpoints_in_one_process_do_not_mix(kit: Kit, tmp_path: Path) -> None:
    """Both wrappers are constructed before either loads, as a draft model's are."""
    other = Weights.random(99)
    write_checkpoint(tmp_path, [other])
    first, second = kit.make(), kit.make(weight_path=str(tmp_path))
    for wrapper in (first, second):
        wrapper.load_weights(torch.arange(E))
    batch = kit.batch(3)
    assert_close(kit.forward(first, batch), kit.weights[0].forward(batch))
    assert_close(kit.forward(second, batch), other.forward(batch))


def test_tensors_in_memory_give_the_same_experts(kit: Kit) -> None:
    """bf16 tensors whose values MXFP4 holds exactly."""
    wrapper, w = kit.make(layer_idx=0), kit.weights[0]
    tensors = [torch.from_numpy(w.values(n)).to(torch.bfloat16) for n in ("gate", "up", "down")]
    try:
        wrapper.load_weights_from_tensors(*tensors, MAPS["rotated"])
    except NotImplementedError:
        pytest.skip("optional: this method has no load_weights_from_tensors")
    for tensor in tensors:
        tensor.zero_()
    batch = kit.batch(4)
    assert_close(kit.forward(wrapper, batch), w.forward(batch, mapping=MAPS["rotated"]))


BAD_MAPS = {
    "too_short": torch.arange(E - 1),
    "too_long": torch.arange(E + 1),
    "beyond_the_checkpoint": torch.arange(1, E + 1),
    "negative": torch.arange(-1, E - 1),
    "of_floats": torch.arange(E).float(),
    "two_dimensional": torch.arange(E)[None],
    "no_tensor": "0, 1, 2",
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_map_raises(kit: Kit, name: str) -> None:
    kit.load(MAPS["identity"])
    with pytest.raises(Exception):  # noqa: B017 - any exception is an answer, a crash is not
        kit.load(BAD_MAPS[name])  # type: ignore[arg-type]


Tensors = dict[str, torch.Tensor]
EXPERT = "layers.0.ffn.experts.5"


def _drop_last_expert(tensors: Tensors) -> None:
    for key in [key for key in tensors if f".experts.{E - 1}." in key]:
        del tensors[key]


def _halve(key: str, axis: int) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        size = tensors[key].shape[axis] // 2
        tensors[key] = tensors[key].narrow(axis, 0, size).contiguous()

    return damage


def _nan_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.w2.scale"].view(torch.uint8)[0, 0] = 255


DAMAGE: dict[str, Callable[[Tensors], object]] = {
    "missing_weight": lambda t: t.pop(f"{EXPERT}.w3.weight"),
    "missing_scale": lambda t: t.pop(f"{EXPERT}.w2.scale"),
    "missing_expert": _drop_last_expert,
    "too_few_rows": _halve(f"{EXPERT}.w1.weight", 0),
    "too_few_columns": _halve(f"{EXPERT}.w1.weight", 1),
    "too_few_scales": _halve(f"{EXPERT}.w2.scale", 1),
    "wrong_dtype": lambda t: t.update({f"{EXPERT}.w1.weight": torch.zeros(I, H // 2)}),
    "scale_that_is_nan": _nan_scale,
    "empty": lambda t: (t.clear(), t.update(other=torch.zeros(1))),
}


def _damaged(kit: Kit, folder: Path, damage: Callable[[Tensors], object]) -> Path:
    """The checkpoint's first layer, which loads, damaged in a folder of its own."""
    kit.load()
    write_checkpoint(folder, kit.weights[:1])
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_raises(kit: Kit, tmp_path: Path, name: str) -> None:
    folder = _damaged(kit, tmp_path, DAMAGE[name])
    with pytest.raises(Exception):  # noqa: B017
        kit.load(weight_path=str(folder))


def test_missing_tensor_is_named(kit: Kit, tmp_path: Path) -> None:
    folder = _damaged(kit, tmp_path, DAMAGE["missing_scale"])
    with pytest.raises(Exception, match=rf"{EXPERT}\.w2\.scale"):
        kit.load(weight_path=str(folder))


def test_truncated_file_raises(kit: Kit, tmp_path: Path) -> None:
    file = _damaged(kit, tmp_path, lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception):  # noqa: B017
        kit.load(weight_path=str(tmp_path))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 2 * H},
        {"hidden_size": H // 2},
        {"moe_intermediate_size": 2 * I},
        {"moe_intermediate_size": I // 2},
        {"num_experts": 2 * E},
        {"layer_idx": 99},
    ],
    ids=lambda sizes: "_".join(map(str, *sizes.items())),
)
def test_sizes_that_are_not_the_checkpoints_raise(kit: Kit, sizes: dict[str, int]) -> None:
    kit.load()
    wrapper = kit.make(**sizes)
    with pytest.raises(Exception):  # noqa: B017
        wrapper.load_weights(torch.arange(sizes.get("num_experts", E)))


def test_failed_load_can_be_repeated(kit: Kit) -> None:
    wrapper = kit.make()
    with pytest.raises(Exception):  # noqa: B017
        wrapper.load_weights(BAD_MAPS["beyond_the_checkpoint"])
    wrapper.load_weights(torch.arange(E))
    batch = kit.batch(2)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))
