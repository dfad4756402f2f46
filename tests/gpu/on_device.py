"""HYBRID_MOE_TEST_GPU=cuda: the kernels' tests run on the GPU, with the vectors of the simulator.

The arrays of a launch are copied to the device and back. What only the simulator counts (requests,
sectors, bank conflicts) is skipped when a test asks for it, which tests do after they have compared
results.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pytest

from hybrid_moe.gpu_kernels.definition import KernelDefinition

DEVICE = "cuda"
ON_DEVICE = os.environ.get("HYBRID_MOE_TEST_GPU") == "cuda"


class DeviceReport:
    """Instead of a `Report`: nothing was counted."""

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"{name} of a launch: only the simulator counts")


@functools.cache
def architecture() -> str:
    """That of the GPU."""
    from hybrid_moe.gpu_kernels.toolchain.launching import device_architecture

    return device_architecture(0)


def run(
    definition: KernelDefinition, grid: Sequence[int], values: Mapping[str, Any]
) -> DeviceReport:
    """Launch the kernel; arrays and tensors among `values` are then as it left them."""
    import torch

    from hybrid_moe.gpu_kernels.toolchain import binaries, launching

    binaries.compiled_here(definition, architecture())  # what the launch then finds in memory
    given: list[Any] = []
    back: list[tuple[Any, Any]] = []
    for argument in definition.arguments:
        value = values[argument.name]
        if argument.align and value is not None:
            host = _bytes(value)
            copy = torch.empty(max(host.numel(), 1), dtype=torch.uint8, device=DEVICE)
            copy[: host.numel()].copy_(host)
            back.append((host, copy))
            value = copy
        given.append(value)
    launching.launch(definition, given, tuple(grid))
    torch.cuda.synchronize()
    for host, copy in back:
        host.copy_(copy[: host.numel()])
    return DeviceReport()


def _bytes(value: Any) -> Any:
    """All bytes of a contiguous array or tensor on the CPU, as a tensor that shares them."""
    import torch

    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return torch.from_numpy(value.reshape(-1).view(np.uint8))
    assert value.device.type == "cpu" and value.is_contiguous()
    return value.detach().view(-1).view(torch.uint8)
