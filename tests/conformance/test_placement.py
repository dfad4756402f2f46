"""Clauses of the GPU mask: which experts are skipped, and that it is live."""

from __future__ import annotations

import pytest
import torch

from .kit import E, Kit, assert_close, mask_of


@pytest.mark.parametrize("experts", [(0,), (0, 1, 2), (1, 4, 7), (7,)], ids=str)
def test_experts_on_the_gpu_contribute_nothing(kit: Kit, experts: tuple[int, ...]) -> None:
    wrapper, batch = kit.load(gpu_experts_mask=mask_of(*experts)), kit.batch(7)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip=set(experts)))


def test_all_experts_on_the_gpu_gives_zeros(kit: Kit) -> None:
    wrapper = kit.load(gpu_experts_mask=mask_of(*range(E)))
    for tokens in (0, 1, 5):
        assert not kit.forward(wrapper, kit.batch(tokens)).any()


def test_token_whose_experts_are_all_on_the_gpu_gives_zeros(kit: Kit) -> None:
    wrapper, batch = kit.load(gpu_experts_mask=mask_of(0, 1, 2)), kit.batch(3)
    batch.ids[1] = torch.tensor([2, 0, 1])
    output = kit.forward(wrapper, batch)
    assert not output[1].any()
    assert_close(output, kit.weights[0].forward(batch, skip={0, 1, 2}))


def test_cpu_and_gpu_parts_add_up_to_the_layer(kit: Kit) -> None:
    """What the GPU leaves out is what the mask leaves in."""
    batch = kit.batch(7)
    one = kit.forward(kit.load(gpu_experts_mask=mask_of(0, 3, 5)), batch)
    other = kit.forward(kit.load(gpu_experts_mask=mask_of(1, 2, 4, 6, 7)), batch)
    assert_close(one + other, kit.weights[0].forward(batch))


def test_mask_changed_in_place_holds_from_the_next_call(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(6)
    for skip in ((), (3,), (0, 1, 6), tuple(range(E)), (5,)):
        wrapper.gpu_experts_mask.copy_(mask_of(*skip))
        assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip=set(skip)))


def test_each_layer_has_a_mask_of_its_own(kit: Kit) -> None:
    first, second = kit.load(layer_idx=0), kit.load(layer_idx=1)
    first.gpu_experts_mask[2] = True
    batch = kit.batch(4)
    assert_close(kit.forward(first, batch), kit.weights[0].forward(batch, skip={2}))
    assert_close(kit.forward(second, batch), kit.weights[1].forward(batch))


def test_mask_changed_after_submit_leaves_the_call_under_way_alone(kit: Kit) -> None:
    if kit.device.type != "cpu":
        pytest.skip("on a GPU the mask is read when the stream gets there")
    wrapper = kit.load()
    for seed in range(5):
        batch = kit.batch(40, seed)
        wrapper.gpu_experts_mask.copy_(mask_of(seed))
        wrapper.submit_forward(*batch.args, kit.stream)
        wrapper.gpu_experts_mask.fill_(True)
        output = kit.sync(wrapper, batch.hidden)
        assert_close(output, kit.weights[0].forward(batch, skip={seed}))


def test_expert_taken_off_the_gpu_is_computed_or_an_error(kit: Kit) -> None:
    """An implementation need not load what the mask put on the GPU; it must not be silent."""
    wrapper, batch = kit.load(gpu_experts_mask=mask_of(2)), kit.batch(4)
    batch.ids[0, 0] = 2
    wrapper.gpu_experts_mask[2] = False
    try:
        output = kit.forward(wrapper, batch)
    except Exception:
        wrapper.gpu_experts_mask[2] = True
        expected = kit.weights[0].forward(batch, skip={2})
        assert_close(kit.forward(wrapper, batch), expected)
    else:
        assert_close(output, kit.weights[0].forward(batch))


def test_mask_and_minus_one_may_meet(kit: Kit) -> None:
    wrapper, batch = kit.load(gpu_experts_mask=mask_of(1, 5)), kit.batch(9)
    batch.ids[batch.ids == 5] = -1
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip={1, 5}))
