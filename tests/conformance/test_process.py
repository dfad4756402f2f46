"""Clauses of what belongs to the process: static methods and the module's other names."""

from __future__ import annotations

import torch

from .kit import E, Kit, assert_close


def test_capture_batch_sizes_can_be_set_and_read_on_the_class(kit: Kit) -> None:
    kit.implementation.set_capture_batch_sizes([1, 2, 8])
    assert list(kit.implementation.get_capture_batch_sizes()) == [1, 2, 8]


def test_capture_batch_sizes_are_shared_by_wrappers(kit: Kit) -> None:
    wrapper = kit.make()
    kit.implementation.set_capture_batch_sizes([1, 4])
    assert list(wrapper.get_capture_batch_sizes()) == [1, 4]
    wrapper.set_capture_batch_sizes([3])
    assert list(kit.implementation.get_capture_batch_sizes()) == [3]


def test_capture_batch_sizes_are_copied(kit: Kit) -> None:
    sizes = [1, 2]
    kit.implementation.set_capture_batch_sizes(sizes)
    sizes.append(99)
    assert list(kit.implementation.get_capture_batch_sizes()) == [1, 2]


def test_capture_batch_sizes_may_be_empty(kit: Kit) -> None:
    kit.implementation.set_capture_batch_sizes([])
    assert list(kit.implementation.get_capture_batch_sizes()) == []


def test_announced_and_other_batch_sizes_give_right_results(kit: Kit) -> None:
    kit.implementation.set_capture_batch_sizes([1, 4])
    wrapper = kit.load()
    for tokens in (1, 3, 4, 1, 5, 4):
        batch = kit.batch(tokens)
        assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


def test_clear_buffer_cache_loses_nothing_of_a_submission(kit: Kit) -> None:
    kit.implementation.clear_buffer_cache()  # before any call
    wrapper, batch = kit.load(), kit.batch(3)
    wrapper.submit_forward(*batch.args, kit.stream)
    kit.implementation.clear_buffer_cache()
    assert_close(kit.sync(wrapper, batch.hidden), kit.weights[0].forward(batch))


def test_clear_buffer_cache_between_calls_changes_nothing(kit: Kit) -> None:
    wrapper, batch = kit.load(), kit.batch(3)
    for _ in range(2):
        assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))
        kit.implementation.clear_buffer_cache()


def test_force_release_loader_between_loads_changes_nothing(kit: Kit) -> None:
    batch = kit.batch(2)
    for layer in (0, 1):
        wrapper = kit.load(layer_idx=layer)
        wrapper.force_release_loader()
        assert_close(kit.forward(wrapper, batch), kit.weights[layer].forward(batch))


def test_generate_gpu_experts_masks_takes_the_most_used_of_all_layers(kit: Kit) -> None:
    freq = torch.tensor([[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]])
    masks = kit.module.generate_gpu_experts_masks(freq, 3)
    assert masks.dtype == torch.bool and masks.device.type == "cpu"
    assert masks.tolist() == [[False, True, False, True], [False, False, True, False]]


def test_generate_gpu_experts_masks_clamps_the_total(kit: Kit) -> None:
    freq = torch.rand(2, E)
    assert kit.module.generate_gpu_experts_masks(freq, 99 * E).all()
    assert not kit.module.generate_gpu_experts_masks(freq, 0).any()


def test_generate_gpu_experts_masks_takes_any_strides(kit: Kit) -> None:
    freq = torch.tensor([[1.0, 4.0], [3.0, 2.0]]).t()
    masks = kit.module.generate_gpu_experts_masks(freq, 2)
    assert masks.tolist() == [[False, True], [True, False]]
