"""Tests of kernels on a GPU, without one: arrays go there and come back, and what only the
simulator counts is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import binaries, launching
from tests.gpu import on_device
from tests.gpu.harness import distinct_architectures, simulate
from tests.gpu.toolchain.kernels import scaling


def test_arrays_go_there_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(definition: KernelDefinition, values: Sequence[Any], grid: Sequence[int]) -> None:
        x, y, n, factor = values
        launched.append((x.data_ptr(), tuple(grid), y))
        y.view(torch.float32)[:n] = x.view(torch.float32)[:n] * factor

    monkeypatch.setattr(on_device, "ON_DEVICE", True)
    monkeypatch.setattr(on_device, "DEVICE", "cpu")
    monkeypatch.setattr(on_device, "architecture", lambda: "sm_90")
    monkeypatch.setattr(binaries, "compiled_here", lambda definition, arch: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launching, "launch", launch)
    x, y = np.arange(5, dtype=np.float32), torch.zeros(5)
    assert distinct_architectures(scaling()) == ("sm_90",)
    report = simulate(scaling(), "sm_80", (2, 1), {"x": x, "y": y, "n": 4, "factor": 3.0})
    assert y.tolist() == [0, 3, 6, 9, 0]
    assert launched[0][:2] != (x.ctypes.data, (2, 1)) and launched[0][1] == (2, 1)
    with pytest.raises(pytest.skip.Exception, match="only the simulator counts"):
        report.bank_conflicts()
