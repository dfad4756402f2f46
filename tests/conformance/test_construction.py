"""Clauses of the constructor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .kit import CHUNK, E, H, I, K, Kit, assert_close, mask_of, write_checkpoint

DEFAULTS: dict[str, Any] = {
    "cpu_save": False,
    "max_deferred_experts_per_token": None,
    "numa_nodes": None,
    "mode": "inference",
    "num_gpu_experts": 0,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "max_cache_depth": 1,
    "group_size": 128,
    "zero_point": True,
    "full_weight_grad": False,
    "swiglu_limit": 0.0,
    "swiglu_alpha": 0.0,
}
"""Documented defaults of kt-kernel's keywords that `Kit.arguments` leaves out."""


@pytest.mark.parametrize("name", [*DEFAULTS, "all"])
def test_keywords_with_their_documented_defaults_change_nothing(kit: Kit, name: str) -> None:
    given = DEFAULTS if name == "all" else {name: DEFAULTS[name]}
    wrapper, batch = kit.load(**given), kit.batch(4)
    assert not wrapper.gpu_experts_mask.any() and wrapper.num_gpu_experts == 0
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))
    plain = kit.forward(kit.load(), batch)
    assert (kit.forward(wrapper, batch) == plain).all()


def test_positional_arguments_have_their_documented_order(kit: Kit) -> None:
    wrapper = kit.implementation(
        0, E, K, H, I, mask_of(1), 1, 1, str(kit.folder), CHUNK, False, 0, "MXFP4", [0]
    )
    kit.made.append(wrapper)
    wrapper.load_weights(torch.arange(E))
    batch = kit.batch(2)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip={1}))


@pytest.mark.parametrize("chunk", [CHUNK, -1, None], ids=lambda chunk: f"chunk_{chunk}")
def test_num_gpu_experts_without_a_mask_puts_the_first_ids_on_the_gpu(
    kit: Kit, chunk: int | None
) -> None:
    """The call of SGLang 0.5.23, to the letter."""
    wrapper = kit.implementation(
        layer_idx=0,
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_intermediate_size=I,
        num_gpu_experts=3,
        cpuinfer_threads=1,
        threadpool_count=1,
        weight_path=str(kit.folder),
        chunked_prefill_size=chunk,
        method="MXFP4",
        max_deferred_experts_per_token=0,
    )
    kit.made.append(wrapper)
    wrapper.load_weights(torch.arange(E))
    batch = kit.batch(4)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip={0, 1, 2}))


def test_call_of_sglang_kt(kit: Kit) -> None:
    """To the letter: a mask, NUMA nodes, and the clamp's options at zero."""
    wrapper = kit.implementation(
        layer_idx=0,
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_intermediate_size=I,
        gpu_experts_mask=mask_of(1, 4),
        cpuinfer_threads=1,
        threadpool_count=1,
        numa_nodes=None,
        weight_path=str(kit.folder),
        chunked_prefill_size=CHUNK,
        swiglu_limit=0.0,
        swiglu_alpha=0.0,
        method="MXFP4",
        max_deferred_experts_per_token=0,
    )
    kit.made.append(wrapper)
    wrapper.load_weights(torch.arange(E))
    batch = kit.batch(4)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip={1, 4}))


def test_unknown_keyword_is_refused_by_name(kit: Kit) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        kit.make(no_such_option=1)


def test_mask_none_leaves_all_experts_on_the_cpu(kit: Kit) -> None:
    wrapper, batch = kit.load(gpu_experts_mask=None), kit.batch(4)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))
    assert not wrapper.gpu_experts_mask.any()


def test_mask_is_copied(kit: Kit) -> None:
    mask = mask_of(2)
    wrapper = kit.load(gpu_experts_mask=mask)
    mask.fill_(True)
    batch = kit.batch(4)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch, skip={2}))


def test_mask_attribute_is_a_bool_tensor_on_the_cpu(kit: Kit) -> None:
    mask = kit.make(gpu_experts_mask=mask_of(0, 5)).gpu_experts_mask
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.tolist() == mask_of(0, 5).tolist()


def test_num_gpu_experts_attribute_counts_the_mask(kit: Kit) -> None:
    assert kit.make(gpu_experts_mask=mask_of(0, 5)).num_gpu_experts == 2


def test_num_gpu_experts_may_be_given_beside_a_mask_that_agrees(kit: Kit) -> None:
    wrapper = kit.make(gpu_experts_mask=mask_of(0, 5), num_gpu_experts=2)
    assert wrapper.gpu_experts_mask.tolist() == mask_of(0, 5).tolist()


def test_construction_reads_no_weights(kit: Kit, tmp_path: Path) -> None:
    """Runtimes construct all layers before anything is loaded: what a checkpoint holds counts when
    it is loaded, and not before."""
    wrapper = kit.make(weight_path=str(tmp_path))
    with pytest.raises(Exception):  # noqa: B017 - there is nothing yet
        wrapper.load_weights(torch.arange(E))
    late = kit.make(weight_path=str(tmp_path))
    write_checkpoint(tmp_path, kit.weights)
    late.load_weights(torch.arange(E))
    batch = kit.batch(3)
    assert_close(kit.forward(late, batch), kit.weights[0].forward(batch))


def test_weight_path_may_be_a_path_object(kit: Kit) -> None:
    wrapper, batch = kit.load(weight_path=kit.folder), kit.batch(1)
    assert_close(kit.forward(wrapper, batch), kit.weights[0].forward(batch))


BAD: dict[str, dict[str, Any]] = {
    "no_experts": {"num_experts": 0},
    "negative_experts": {"num_experts": -8},
    "more_experts_per_token_than_experts": {"num_experts_per_tok": E + 1},
    "no_experts_per_token": {"num_experts_per_tok": 0},
    "negative_layer": {"layer_idx": -1},
    "hidden_size_zero": {"hidden_size": 0},
    "hidden_size_that_cuts_a_group": {"hidden_size": H + 1},
    "intermediate_size_that_cuts_a_group": {"moe_intermediate_size": I - 1},
    "unknown_method": {"method": "MXFP5"},
    "unknown_mode": {"mode": "training"},
    "mask_of_wrong_length": {"gpu_experts_mask": torch.zeros(E - 1, dtype=torch.bool)},
    "mask_of_numbers": {"gpu_experts_mask": torch.full((E,), 0.5)},
    "mask_that_is_a_number": {"gpu_experts_mask": 3},
    "count_beyond_the_experts": {"num_gpu_experts": E + 1},
    "negative_count": {"num_gpu_experts": -1},
    "missing_path": {"weight_path": "/no/such/checkpoint"},
    "no_threads": {"cpuinfer_threads": 0},
    "fewer_threads_than_pools": {"cpuinfer_threads": 1, "threadpool_count": 2},
    "numa_nodes_of_wrong_length": {"numa_nodes": [0, 0]},
    "unknown_numa_node": {"numa_nodes": [900]},
    "more_deferred_than_chosen": {"max_deferred_experts_per_token": K + 1},
    "negative_deferral": {"max_deferred_experts_per_token": -1},
    "negative_limit": {"swiglu_limit": -1.0},
    "text_for_a_number": {"hidden_size": "256"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_raises(kit: Kit, name: str) -> None:
    """At the latest when weights are loaded; never a crash, never silence."""
    kit.load()  # without the bad argument it works
    with pytest.raises(Exception):  # noqa: B017 - any exception is an answer, a crash is not
        kit.load(**BAD[name])


def test_implementation_works_after_a_bad_argument(kit: Kit) -> None:
    for arguments in BAD.values():
        with pytest.raises(Exception):  # noqa: B017
            kit.load(**arguments)
    batch = kit.batch(2)
    assert_close(kit.forward(kit.load(), batch), kit.weights[0].forward(batch))
