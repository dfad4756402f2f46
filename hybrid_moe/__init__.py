"""Mixture-of-experts models far larger than the GPU, from one small pure-Python wheel.

The names below are imported when first used (PEP 562), so that importing a lower part, such as
`hybrid_moe.cpu_kernels`, never pulls in an upper one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import hybrid_moe.imported  # noqa: F401, first: it notes when the package was imported

__version__ = "0.1.0"

_LAZY = {
    "DeferralChain": "hybrid_moe.runtime.deferral",
    "KTMoEWrapper": "hybrid_moe.wrapper",
    "check_errors": "hybrid_moe.streams.faults",
    "metrics": "hybrid_moe.runtime.metrics",
    "generate_gpu_experts_masks": "hybrid_moe.placement.strategies",
    "from_pretrained": "hybrid_moe.integrations.transformers.registration",
    "offload": "hybrid_moe.integrations.transformers.registration",
    "register": "hybrid_moe.integrations.transformers.registration",
}

__all__ = [
    "DeferralChain",
    "KTMoEWrapper",
    "__version__",
    "check_errors",
    "from_pretrained",
    "generate_gpu_experts_masks",
    "metrics",
    "offload",
    "register",
]

if TYPE_CHECKING:
    from hybrid_moe.integrations.transformers.registration import from_pretrained, offload, register
    from hybrid_moe.placement.strategies import generate_gpu_experts_masks
    from hybrid_moe.runtime.deferral import DeferralChain
    from hybrid_moe.runtime.metrics import metrics
    from hybrid_moe.streams.faults import check_errors
    from hybrid_moe.wrapper import KTMoEWrapper


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hybrid_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if "transformers" in sys.modules:  # its users may ask for experts_implementation="hybrid_moe" now
    from hybrid_moe.integrations.transformers.registration import register_or_warn

    register_or_warn()
