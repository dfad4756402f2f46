"""Page-locked panels: the GPU copies experts out of the arenas, and into them, by itself.

`cudaHostRegister` locks an arena when its experts are packed, so that their pages lie where the
packing threads' nodes have them: one call for each layer and node, some GB each. Where the system
refuses (RLIMIT_MEMLOCK, a container), copies still work: the driver takes them through a ring of
pinned buffers of its own, on the host's time, and each byte is read and written once more on the
way. That is logged once and counted (`PageLocks.staged`).
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.locks import ProcessLock
from hybrid_moe.logs import warn_once

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: for the contexts of all devices


@dataclass
class PageLocks:
    """What has been locked in this process, in bytes.

    Attributes:
        locked: of arenas that are page-locked now. refused: of those that the system would not.
        seconds: that locking took.
        staged: copied through the driver's ring, since an arena was refused.
    """

    locked: int = 0
    refused: int = 0
    seconds: float = 0.0
    staged: int = 0

    def __str__(self) -> str:
        total = self.locked + self.refused
        share = self.locked / total if total else 1.0
        return (
            f"{self.locked / 2**30:.1f} GiB of panels page-locked ({share:.0%}) in "
            f"{self.seconds:.1f} s; {self.staged / 2**30:.1f} GiB copied through pinned buffers"
        )


LOCKS = PageLocks()
"""Of the process."""

_counting = ProcessLock()


def _register(address: int, nbytes: int) -> str | None:
    """Page-lock memory: None, or why not."""
    from hybrid_moe.streams.cuda import relaxed, runtime

    library = runtime()
    library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    library.cudaHostRegister.restype = ctypes.c_int
    code = relaxed(lambda: library.cudaHostRegister(address, nbytes, _PORTABLE))
    if code == 0:
        return None
    library.cudaGetLastError()  # or torch takes it for an error of its next call
    return f"{library.cudaGetErrorString(code).decode()} (error {code})"


def _unregister(address: int) -> None:
    from hybrid_moe.streams.cuda import relaxed, runtime

    library = runtime()
    library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
    library.cudaHostUnregister.restype = ctypes.c_int
    if relaxed(lambda: library.cudaHostUnregister(address)) != 0:
        library.cudaGetLastError()


def trial(
    nbytes: int = 256 << 20,
    register: Callable[[int, int], str | None] = _register,
    unregister: Callable[[int], None] = _unregister,
) -> str:
    """Whether memory can be page-locked here and how fast, in a sentence without its full stop."""
    arena = Arena(nbytes)
    arena.bytes[:] = 0  # resident, as packed experts are
    begin = time.perf_counter()
    refusal = register(arena.address, nbytes)
    seconds = time.perf_counter() - begin
    if refusal is not None:
        return f"refused: {refusal}; experts that move go through the driver's pinned buffers"
    unregister(arena.address)
    return f"{nbytes >> 20} MiB in {seconds:.2f} s, {seconds * 2**30 / nbytes:.2f} s per GiB"


def page_lock(
    arena: Arena,
    register: Callable[[int, int], str | None] = _register,
    unregister: Callable[[int], None] = _unregister,
) -> bool:
    """Page-lock an arena for as long as it lives; whether that was possible.

    Args:
        register, unregister: the runtime's calls.
    """
    nbytes, address = arena.nbytes, arena.address
    if not nbytes:
        return True
    begin = time.perf_counter()
    refusal = register(address, nbytes)
    with _counting:
        LOCKS.seconds += time.perf_counter() - begin
        if refusal is None:
            LOCKS.locked += nbytes
        else:
            LOCKS.refused += nbytes
    if refusal is not None:
        warn_once(
            f"panels of experts cannot be page-locked: {refusal}. Experts that move between CPU "
            "and GPU go through pinned buffers of the driver, and the host waits for them; raise "
            "the limit on locked memory (ulimit -l, --ulimit memlock=-1) to avoid that"
        )
        return False

    def release() -> None:
        unregister(address)
        LOCKS.locked -= nbytes  # without the lock: the collector may run in whoever holds it

    arena.before_unmapping(release)
    return True
