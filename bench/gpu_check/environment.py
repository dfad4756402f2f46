"""What this machine is: GPU, driver, versions, processor. No part of it may fail the check."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict
from typing import Any

from hybrid_moe.gpu_kernels.toolchain import availability
from hybrid_moe.gpu_kernels.toolchain.kernel_sources import dsl_version

_QUERY = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,pcie.link.gen.max,"
    "pcie.link.width.max,ecc.mode.current,compute_mode"
)


def said(*command: str) -> str | None:
    """What a command prints; None where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Facts for the receipt."""
    import torch

    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
        }
    return {
        "gpu": gpu,
        "kernels": asdict(availability()),
        "nvidia-smi": said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dsl": dsl_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "lscpu": said("lscpu"),
    }


def has_amx() -> bool:
    """Whether this processor has AMX for bf16 and int8."""
    from hybrid_moe.planning.doctor import host_features

    return {"amx-bf16", "amx-int8"} <= set(host_features())
