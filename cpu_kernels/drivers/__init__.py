"""Compiled loops around the kernels: routing, phases, workers, a GPU's mailboxes.

Everything here but `records` is compiled, and imported only when the object cache is cold.
"""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from collections.abc import Mapping

import llvmlite.binding as llvm

from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions
from hybrid_moe.cpu_kernels.jit.sources import source_key
from hybrid_moe.locks import ProcessLock

_ENTRIES = {
    "try_launch": "worker",
    "work": "worker",
    "help_until": "worker",
    "wake_all": "worker",
    "become_worker0": "worker",
    "post_host": "host",
    "wait_host": "host",
    "close_host": "host",
    "watch": "mailbox",
    "watch_once": "mailbox",
    "fingerprint": "hash_memory",
    "publish_word": "publish",
    "apply_move": "move_expert",
    "split_routing": "split_routing",
}
"""Driver that Python calls -> its module here."""

# Threads that load experts need the drivers at the same time. Once is enough, and some versions of
# Python (3.11.7 is one) raise a SystemError when two threads parse source code at once.
_once = ProcessLock()

MACHINES = ("x86_64", "aarch64")
"""What drivers have fences, pauses and system calls for."""


def check_machine() -> None:
    """Raise `NotImplementedError` on a machine that nothing here has been written for, before LLVM
    ends the process over an operation that it does not know."""
    machine = platform.machine()
    if machine not in MACHINES or sys.maxsize < 2**63 - 1:
        bits = sys.maxsize.bit_length() + 1
        raise NotImplementedError(
            f"hybrid_moe computes on {' and '.join(MACHINES)} with a 64-bit Python; this is a "
            f"{bits}-bit Python on {machine}"
        )


def addresses() -> Mapping[str, int]:
    """Address of every driver that Python calls, compiled on first use or from the object cache.

    Each takes and returns int64 only.

    Raises:
        NotImplementedError: see `check_machine`.
    """
    with _once:
        return _compiled()


@functools.lru_cache(maxsize=1)
def _compiled() -> Mapping[str, int]:
    check_machine()
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
