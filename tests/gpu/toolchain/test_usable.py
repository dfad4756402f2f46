"""Which GPUs kernels run on, and what is said where they do not."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybrid_moe import binary_cache
from hybrid_moe.gpu_kernels.toolchain import availability, cuda_driver, usable
from hybrid_moe.gpu_kernels.toolchain.architectures import architecture_of
from tests.gpu.toolchain.fake_driver import FakeLibrary


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), None), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"),
        ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), None),
        ((12, 0), "sm_120"), ((12, 1), "sm_120"), ((13, 0), None),
    ],
)  # fmt: skip
def test_architecture(capability: tuple[int, int], arch: str | None) -> None:
    """Code runs on later GPUs of its generation, on no earlier one and on no other generation."""
    assert architecture_of(capability) == arch


def test_here() -> None:
    """The sentence is true of this machine."""
    found = availability()
    assert found.reason and not found.reason.endswith(".")
    assert not found.usable or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("capability", "dsl", "driver", "usable_", "reason"),
    [
        ((9, 0), "4.8.1 cu12", 12090, True, "NVIDIA X runs kernels for sm_90, compiled by "),
        ((9, 0), "4.8.1 cu12", 13000, True, "nvidia-cutlass-dsl 4.8.1 cu12"),
        ((7, 5), "4.8.1 cu12", 12090, False, "NVIDIA X has compute capability 7.5; there are"),
        ((9, 0), None, 12090, False, "nvidia-cutlass-dsl is not installed: pip install"),
        ((9, 0), None, 12091, True, "sm_90, compiled by .* what the cache has"),
        ((9, 0), "4.8.1 cu13", 12090, False, "the driver is for CUDA 12.9, .* 13.0 or later"),
        ((9, 0), "4.8.1 cu12", 11080, False, "the driver is for CUDA 11.8, .* 12.0 or later"),
        ((9, 0), "4.8.1 cu12", -1, False, "asking its version: CUDA_ERROR_803 .*reboot"),
    ],
)
def test_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dsl: str | None,
    driver: int,
    usable_: bool,
    reason: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HYBRID_MOE_CACHE_DIR", str(tmp_path / "cache"))
    if driver % 10:
        binary_cache.write(f"{0:064}.cubin", b"")
    library = FakeLibrary()
    if driver < 0:
        library.codes["cuDriverGetVersion"] = 803
    monkeypatch.setattr(
        library, "cuDriverGetVersion",
        lambda version: library.codes.get("cuDriverGetVersion", 0)
        or setattr(version._obj, "value", driver) or 0,
    )  # fmt: skip
    monkeypatch.setattr(cuda_driver, "driver", lambda: cuda_driver.CudaDriver(library))
    monkeypatch.setattr(usable, "dsl_version", lambda: dsl)
    monkeypatch.setattr(usable, "DRIVER_FILES", (Path(__file__),))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(
        torch, "cuda",
        SimpleNamespace(
            is_available=lambda: True,
            get_device_name=lambda device: "NVIDIA X",
            get_device_capability=lambda device: capability,
        ),
    )  # fmt: skip
    found = availability()
    assert found.usable == usable_
    assert re.search(reason, found.reason), found.reason


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reason that holds: no driver, a torch for CPUs, no GPU that it may use."""
    monkeypatch.setattr(usable, "DRIVER_FILES", (Path("/dev/no_gpu"),))
    assert "its driver is not loaded (no /dev/no_gpu)" in availability().reason
    monkeypatch.setattr(usable, "DRIVER_FILES", (Path(__file__),))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in availability().reason
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert availability().reason == "torch finds no GPU that it can use"
