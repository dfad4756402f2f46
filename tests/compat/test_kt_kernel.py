"""The import name `kt_kernel`: what engines import and probe, and the refusal beside the real one.

The package is taken from its folder; it is not installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.cpu_kernels.dsl import tiers
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS

FOLDER = Path(__file__).parents[2] / "compat" / "kt_kernel"
KT_VARIANTS = {"avx2", "avx512_base", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx"}
OUR_VARIANTS = {"portable", "neon", "neon_dotprod"}  # kt-kernel has no such variants
NAMES = ("kt_kernel", "kt_kernel.kt_kernel_ext", "kt_kernel_ext")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`import kt_kernel` finds the package in the repository, as if for the first time; a
    kt-kernel of the developer's is out of sight."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.metadata, "version", _version_of({}))
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield monkeypatch
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def kt_kernel(fresh: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("kt_kernel")


def _version_of(known: dict[str, str]) -> Any:
    """`importlib.metadata.version` where only `known` distributions are installed."""

    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return version


# kt-kernel 0.7.2: KTMoEWrapper.__new__ (all but the last two are what sglang-kt passes by keyword)
PARAMETERS: dict[str, Any] = {
    "layer_idx": ...,
    "num_experts": ...,
    "num_experts_per_tok": ...,
    "hidden_size": ...,
    "moe_intermediate_size": ...,
    "gpu_experts_mask": ...,
    "cpuinfer_threads": ...,
    "threadpool_count": ...,
    "weight_path": ...,
    "chunked_prefill_size": ...,
    "cpu_save": False,
    "max_deferred_experts_per_token": None,
    "method": ...,  # kt-kernel's default is a format that is not available here
    "numa_nodes": None,
    "mode": "inference",
    "num_gpu_experts": ...,  # kt-kernel: 0; here None, which means the same
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

METHODS = {
    "load_weights": ["physical_to_logical_map_cpu"],
    "load_weights_from_tensors": [
        "gate_proj",
        "up_proj",
        "down_proj",
        "physical_to_logical_map_cpu",
    ],
    "submit_forward": ["hidden_states", "topk_ids", "topk_weights", "cuda_stream"],
    "sync_forward": ["hidden_states", "cuda_stream"],
    "forward": ["hidden_states", "topk_ids", "topk_weights", "cuda_stream"],
    "select_deferred_experts": ["expert_ids", "expert_scores", "protected_k"],
    "submit_write_weight_scale_to_buffer": [
        "gpu_tp_count",
        "expert_id",
        "w13_weight_ptrs",
        "w13_scale_ptrs",
        "w2_weight_ptrs",
        "w2_scale_ptrs",
    ],
    "sync_write_weight_scale_to_buffer": [],
}

STATIC = {
    "set_capture_batch_sizes": ["capture_bs"],
    "get_capture_batch_sizes": [],
    "clear_buffer_cache": [],
    "force_release_loader": [],
}


def test_constructor_has_kt_kernels_parameters(kt_kernel: ModuleType) -> None:
    given = inspect.signature(kt_kernel.KTMoEWrapper).parameters
    positional = [p.name for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(PARAMETERS)
    for name, default in PARAMETERS.items():
        if default is not ...:
            assert given[name].default == default, name


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_kt_kernels_parameters(kt_kernel: ModuleType, name: str) -> None:
    parameters = inspect.signature(getattr(kt_kernel.KTMoEWrapper, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *METHODS[name]]


@pytest.mark.parametrize("name", STATIC)
def test_static_methods_have_kt_kernels_parameters(kt_kernel: ModuleType, name: str) -> None:
    assert list(inspect.signature(getattr(kt_kernel.KTMoEWrapper, name)).parameters) == STATIC[name]


def test_imports_of_sglang(kt_kernel: ModuleType) -> None:
    """sglang-kt's `from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks`."""
    assert kt_kernel.KTMoEWrapper is hybrid_moe.KTMoEWrapper
    masks = kt_kernel.generate_gpu_experts_masks(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), 2)
    assert masks.tolist() == [[False, True], [True, False]]
    assert set(kt_kernel.__all__) <= set(dir(kt_kernel)) | {"__cpu_variant__"}
    assert all(hasattr(kt_kernel, name) for name in kt_kernel.__all__)


def test_probe_of_the_extension_answers_no(kt_kernel: ModuleType) -> None:
    """sglang-kt then copies FP8 experts by its own code."""
    extension = importlib.import_module("kt_kernel.kt_kernel_ext")
    assert kt_kernel.kt_kernel_ext is extension is importlib.import_module("kt_kernel_ext")
    for name in ("initialize_fp8_layerwise_control", "FP8LayerwiseTransport", "CPUInfer"):
        assert not hasattr(extension, name)
    assert getattr(extension, "FP8_LAYERWISE_MAX_TP_SIZE", 8) == 8


def test_version_and_variant(kt_kernel: ModuleType) -> None:
    assert kt_kernel.__version__ == f"0.7.2+hybrid.moe.{hybrid_moe.__version__}"
    assert kt_kernel.__cpu_variant__ in KT_VARIANTS | OUR_VARIANTS


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_has_a_name_of_kt_kernels(
    kt_kernel: ModuleType, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "choose_tier", lambda: TIERS[tier])
    assert kt_kernel.__cpu_variant__ in ({tier} if tier in OUR_VARIANTS else KT_VARIANTS)
    has_bf16 = "avx512bf16" in TIERS[tier].all_features
    assert (kt_kernel.__cpu_variant__ in ("avx512_bf16", "amx")) == has_bf16


def test_what_is_not_here_says_what_is(kt_kernel: ModuleType) -> None:
    with pytest.raises(AttributeError, match=r"CPUInfer is not part of hybrid-moe-kt-compat"):
        _ = kt_kernel.CPUInfer
    assert kt_kernel.AMXSFTMoEWrapper is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kt_kernel.sft")


def test_refuses_beside_the_real_kt_kernel(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(importlib.metadata, "version", _version_of({"kt-kernel": "0.7.2"}))
    with caplog.at_level(logging.ERROR), pytest.raises(ImportError, match="both installed"):
        importlib.import_module("kt_kernel")
    assert "pip uninstall kt-kernel" in caplog.text
    assert "kt_kernel" not in sys.modules


def test_is_not_part_of_hybrid_moe() -> None:
    """Its name is in no metadata of the main distribution, and importing that does not bring it."""
    metadata: Message = importlib.metadata.metadata("hybrid-moe")  # type: ignore[assignment]
    assert not [r for r in metadata.get_all("Requires-Dist") or [] if "compat" in r]
    assert "kt_kernel" not in sys.modules
