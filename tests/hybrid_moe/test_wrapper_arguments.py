"""The constructor: kt-kernel's call shapes, and an error that names each bad argument."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import SIZES, E, H, I, K, wrapper

KT_KERNEL_ORDER = [
    "layer_idx",
    "num_experts",
    "num_experts_per_tok",
    "hidden_size",
    "moe_intermediate_size",
    "gpu_experts_mask",
    "cpuinfer_threads",
    "threadpool_count",
    "weight_path",
    "chunked_prefill_size",
    "cpu_save",
    "max_deferred_experts_per_token",
    "method",
    "numa_nodes",
    "mode",
    "num_gpu_experts",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "max_cache_depth",
    "group_size",
    "zero_point",
    "full_weight_grad",
    "swiglu_limit",
    "swiglu_alpha",
]


def test_parameters_are_those_of_kt_kernel_in_its_order() -> None:
    parameters = inspect.signature(KTMoEWrapper).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == KT_KERNEL_ORDER
    assert hybrid_moe.KTMoEWrapper is KTMoEWrapper


def test_positional_call(tmp_path: Path) -> None:
    mask = torch.arange(E) == 2
    w = KTMoEWrapper(3, E, K, H, I, mask, 1, 1, str(tmp_path), 4096, False, 1, "MXFP4", [0])
    assert w.layer_idx == 3 and w.weight_path == tmp_path.resolve()
    assert w.max_deferred_experts_per_token == 1
    assert w.num_gpu_experts == 1 and w.gpu_experts_mask.tolist() == mask.tolist()


@pytest.mark.parametrize("chunk", [-1, None, 0, 128])
def test_call_of_stock_sglang(tmp_path: Path, chunk: int | None) -> None:
    """Keywords only, with num_gpu_experts and without a mask."""
    w = KTMoEWrapper(
        layer_idx=0,
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_intermediate_size=I,
        num_gpu_experts=3,
        cpuinfer_threads=1,
        threadpool_count=1,
        weight_path=str(tmp_path),
        chunked_prefill_size=chunk,
        method="MXFP4",
        max_deferred_experts_per_token=0,
    )
    assert w.gpu_experts_mask.tolist() == [True] * 3 + [False] * (E - 3)
    assert not w.loaded


def test_mask_is_copied() -> None:
    mask = torch.zeros(E, dtype=torch.bool)
    w = wrapper(gpu_experts_mask=mask)
    mask[0] = True
    assert w.num_gpu_experts == 0
    w.gpu_experts_mask = mask
    assert w.num_gpu_experts == 1
    mask[1] = True
    assert w.num_gpu_experts == 1


def test_mask_and_count_may_both_be_given_when_they_agree() -> None:
    mask = torch.arange(E) % 2 == 0
    w = wrapper(gpu_experts_mask=mask, num_gpu_experts=E // 2)
    assert torch.equal(w.gpu_experts_mask, mask)


def test_defaults_need_no_threads() -> None:
    w = KTMoEWrapper(**SIZES)
    assert w.pool.threads >= 1 and w.pool.pools == 1 and w.method == "MXFP4"


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layer_idx": -1}, ValueError, "layer_idx is -1"),
    ({"layer_idx": 1.0}, TypeError, "layer_idx must be an integer"),
    ({"num_experts": 0}, ValueError, "num_experts is 0"),
    ({"num_experts": True}, TypeError, "num_experts must be an integer"),
    ({"num_experts_per_tok": 0}, ValueError, "num_experts_per_tok is 0"),
    ({"num_experts_per_tok": E + 1}, ValueError, "more than num_experts 8"),
    ({"hidden_size": 0}, ValueError, "hidden_size is 0"),
    ({"hidden_size": 48}, ValueError, "hidden_size is 48, must be a multiple of 32"),
    ({"moe_intermediate_size": 33}, ValueError, "moe_intermediate_size is 33"),
    ({"method": "AMXINT2"}, ValueError, "unknown method 'AMXINT2'.*MXFP4"),
    ({"cpu_save": True}, ValueError, "cpu_save=True is not supported"),
    ({"mode": "sft"}, ValueError, "mode='sft' is not supported"),
    ({"lora_rank": 8}, ValueError, "lora_rank=8"),
    ({"lora_alpha": 1.0}, ValueError, "lora_alpha=1.0"),
    ({"lora_dropout": 0.1}, ValueError, "lora_dropout=0.1"),
    ({"max_cache_depth": 2}, ValueError, "max_cache_depth=2"),
    ({"group_size": 64}, ValueError, "group_size=64"),
    ({"zero_point": False}, ValueError, "zero_point=False"),
    ({"full_weight_grad": True}, ValueError, "full_weight_grad=True"),
    ({"swiglu_limit": -1.0}, ValueError, "swiglu_limit"),
    ({"swiglu_limit": float("nan")}, ValueError, "swiglu_limit"),
    ({"swiglu_alpha": -1.0}, ValueError, "swiglu_alpha"),
    ({"swiglu_alpha": float("inf")}, ValueError, "swiglu_alpha"),
    ({"max_deferred_experts_per_token": -1}, ValueError, "max_deferred_experts_per_token is -1"),
    ({"max_deferred_experts_per_token": K + 1}, ValueError, "max_deferred_experts_per_token is 4"),
    ({"num_gpu_experts": E + 1}, ValueError, "num_gpu_experts is 9, must be between 0 and 8"),
    ({"num_gpu_experts": -1}, ValueError, "num_gpu_experts is -1"),
    ({"gpu_experts_mask": 3}, TypeError, "not int; a number of experts is .* num_gpu_experts="),
    ({"gpu_experts_mask": torch.ones(E)}, TypeError, "torch.bool, not torch.float32"),
    (
        {"gpu_experts_mask": torch.ones(E - 1, dtype=torch.bool)},
        ValueError,
        r"shape \(7,\), must be \(8,\)",
    ),
    (
        {"gpu_experts_mask": torch.ones(E, dtype=torch.bool), "num_gpu_experts": 2},
        ValueError,
        "num_gpu_experts is 2, but gpu_experts_mask has 8",
    ),
    ({"weight_path": "no/such/folder"}, FileNotFoundError, "weight_path 'no/such/folder'"),
    ({"cpuinfer_threads": 0}, ValueError, "threads"),
    ({"cpuinfer_threads": 10_000}, ValueError, "10000 threads"),
    ({"cpuinfer_threads": 1.5}, TypeError, "cpuinfer_threads must be an integer"),
    ({"threadpool_count": 0}, ValueError, "pools"),
    ({"threadpool_count": 2}, ValueError, "1 threads for 2 pools"),
    ({"numa_nodes": [0, 1]}, ValueError, "numa_nodes"),
    ({"numa_nodes": [4096]}, ValueError, "unknown NUMA node 4096"),
    ({"isa": "quantum"}, ValueError, "quantum"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapper(**arguments)


def test_capture_batch_sizes_belong_to_the_process() -> None:
    before = KTMoEWrapper.get_capture_batch_sizes()
    try:
        KTMoEWrapper.set_capture_batch_sizes([8, 1, 2, 8])
        assert wrapper().get_capture_batch_sizes() == [1, 2, 8]
        with pytest.raises(ValueError, match="capture batch size is 0"):
            KTMoEWrapper.set_capture_batch_sizes([0])
        with pytest.raises(TypeError, match="must be an integer"):
            KTMoEWrapper.set_capture_batch_sizes(["8"])  # type: ignore[list-item]
        assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 8]
    finally:
        KTMoEWrapper.set_capture_batch_sizes(before)
