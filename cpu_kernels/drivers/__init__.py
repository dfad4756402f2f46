"""Compiled loops around the kernels: packing, routing, the three phases of a layer, workers.

Everything here but `fields` is written for Numba and imported only when the object cache is cold.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

_MODULES = tuple(
    f"hybrid_moe.cpu_kernels.drivers.{name}"
    for name in ("fields", "memory", "route", "phases", "worker", "pack")
)

_ENTRIES = {
    "launch": "hybrid_moe.cpu_kernels.drivers.worker:launch",
    "work": "hybrid_moe.cpu_kernels.drivers.worker:work",
    "help_until": "hybrid_moe.cpu_kernels.drivers.worker:help_until",
    "wake_all": "hybrid_moe.cpu_kernels.drivers.worker:wake_all",
    "pack_strips": "hybrid_moe.cpu_kernels.drivers.pack:pack_strips",
    "post_host": "hybrid_moe.cpu_kernels.drivers.worker:post_host",
    "wait_host": "hybrid_moe.cpu_kernels.drivers.worker:wait_host",
}


@functools.lru_cache(maxsize=1)
def addresses() -> Mapping[str, int]:
    """Address of every driver, compiled on first use or taken from the object cache."""
    from hybrid_moe.cpu_kernels.jit.native import compile_drivers

    return compile_drivers(_MODULES, _ENTRIES)
