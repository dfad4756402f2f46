"""Compiled loops around the kernels: packing, routing, the three phases of a layer, workers.

Everything here but `fields` is compiled, and imported only when the object cache is cold.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

import llvmlite.binding as llvm

from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions
from hybrid_moe.cpu_kernels.jit.sources import source_key

_ENTRIES = {
    "launch": "worker",
    "work": "worker",
    "help_until": "worker",
    "wake_all": "worker",
    "post_host": "host",
    "wait_host": "host",
    "close_host": "host",
    "watch": "mailbox",
    "watch_once": "mailbox",
    "pack_strips": "pack",
}
"""Driver that Python calls -> its module here."""


@functools.lru_cache(maxsize=1)
def addresses() -> Mapping[str, int]:
    """Address of every driver that Python calls, compiled on first use or from the object cache.

    Each takes and returns int64 only.
    """
    target = Target(cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten())
    return compile_functions(
        drivers_ir, target, list(_ENTRIES), "drivers", sources=source_key("drivers"), program=True
    )


def drivers_ir() -> str:
    """The IR of all drivers."""
    from hybrid_moe.cpu_kernels.jit.translate import translate  # needed on a cold cache only

    modules = {
        name: importlib.import_module(f"{__name__}.{module}") for name, module in _ENTRIES.items()
    }
    return translate({name: getattr(module, name) for name, module in modules.items()})
