"""kt-kernel's import name over `hybrid_moe`, for programs that `import kt_kernel`.

It has what serving engines use of kt-kernel 0.7.2 for inference. Names that it does not have raise
`AttributeError` as they would in an older kt-kernel, so that feature probes answer "no".
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

INTERFACE = "0.7.2"
"""The kt-kernel whose inference interface this is."""


def _refuse_beside_the_real_one() -> None:
    """Both distributions install a package `kt_kernel`: whichever came last has overwritten files
    of the other, and neither is whole."""
    try:
        real = importlib.metadata.version("kt-kernel")
    except importlib.metadata.PackageNotFoundError:
        return
    message = (
        f"kt-kernel {real} and hybrid-moe-kt-compat are both installed, and both provide the "
        "package kt_kernel. Keep one: `pip uninstall kt-kernel`, or `pip uninstall "
        "hybrid-moe-kt-compat` and then reinstall kt-kernel"
    )
    logger.error(message)  # engines catch the ImportError and say no more than "not installed"
    raise ImportError(message)


_refuse_beside_the_real_one()

from hybrid_moe import KTMoEWrapper, generate_gpu_experts_masks  # noqa: E402
from hybrid_moe import __version__ as _own  # noqa: E402

from . import kt_kernel_ext  # noqa: E402

sys.modules.setdefault("kt_kernel_ext", kt_kernel_ext)

__version__ = f"{INTERFACE}+hybrid.moe.{_own}"
__int8_kernel__ = "unsupported"

AMXSFTMoEWrapper = None
"""kt-kernel's value where its part for fine-tuning is absent."""

__all__ = [
    "AMXSFTMoEWrapper",
    "KTMoEWrapper",
    "__cpu_variant__",
    "__int8_kernel__",
    "__version__",
    "generate_gpu_experts_masks",
    "kt_kernel_ext",
]

_VARIANTS = {"avx2_vnni": "avx2", "avx512": "avx512_base", "avx512_vbmi": "avx512_bf16"}
"""Tiers that kt-kernel calls otherwise: its avx512_bf16 has VBMI, its avx512_vbmi no bf16."""


def __getattr__(name: str) -> Any:
    if name == "__cpu_variant__":  # asks the processor, so only when it is asked for
        from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier

        tier = choose_tier().name
        return _VARIANTS.get(tier, tier)
    raise AttributeError(
        f"kt_kernel.{name} is not part of hybrid-moe-kt-compat, which provides kt-kernel "
        f"{INTERFACE}'s inference interface: {', '.join(__all__)}"
    )
