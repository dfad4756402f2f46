"""kt-kernel's extension module, as far as engines look into it: not at all.

sglang-kt asks with `hasattr` whether `FP8LayerwiseTransport` and `initialize_fp8_layerwise_control`
are there, and copies experts by its own Python code where they are not. They move FP8 experts,
which `hybrid_moe` does not hold, so they are not here. There is no `CPUInfer` either: worker pools
belong to the wrapper.
"""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"kt_kernel_ext.{name}: hybrid-moe-kt-compat has no extension module; its experts are used "
        "through kt_kernel.KTMoEWrapper"
    )
