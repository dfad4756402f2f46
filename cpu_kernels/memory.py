"""Arenas: large anonymous mappings that hold packed experts and scratch.

An arena asks for huge pages, is not inherited by fork, and may prefer some NUMA nodes. Its views
keep it alive: the mapping goes when the last array over it does.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import math
import mmap
import os
import platform
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hybrid_moe import sysfiles
from hybrid_moe.formats.numbers import Array
from hybrid_moe.logs import warn_once

logger = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
_MPOL_PREFERRED, _MPOL_INTERLEAVE = 1, 3
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_told_nodes: set[int] = set()


def _warn_once_for(node: int, message: str) -> None:
    if node not in _told_nodes:
        _told_nodes.add(node)
        logger.warning(message)


_live: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_inherited: list[mmap.mmap] = []


def _keep_inherited() -> None:
    """In a forked child: never unmap the parent's arenas. They are not mapped there (DONTFORK), and
    the garbage collector might unmap something else that has these addresses by then."""
    _inherited.extend(_live)


os.register_at_fork(after_in_child=_keep_inherited)


class Arena:
    """`nbytes` of zeroed memory, aligned to 2 MiB, as `bytes` (uint8 [nbytes])."""

    def __init__(self, nbytes: int, numa_nodes: Sequence[int] = ()) -> None:
        """Map the memory; nothing is resident before it is written.

        Args:
            nbytes: size.
            numa_nodes: nodes to take the pages from in turn while they have any; none for first
                touch.

        Raises:
            MemoryError: the system refuses the mapping; the message has the size.
        """
        size = -(-max(nbytes, 1) // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
        try:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"cannot map {nbytes} bytes: {error}") from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            try:
                mapping.madvise(getattr(mmap, advice))
            except (AttributeError, OSError) as error:
                warn_once(f"{advice} is not available: {error}")
        _live.add(mapping)
        raw = np.frombuffer(mapping, np.uint8)
        start = -raw.ctypes.data % HUGE_PAGE
        self.bytes: npt.NDArray[np.uint8] = raw[start : start + nbytes]
        self.address = int(raw.ctypes.data) + start
        self.nbytes = nbytes
        if numa_nodes:
            _place(self.address, max(nbytes, 1), numa_nodes)

    def before_unmapping(self, call: Callable[[], object]) -> None:
        """Call this when the last view is gone, while the memory is still mapped; not at exit, and
        not in a forked child, where it is not mapped."""
        # every view's base is the first array over the mapping, and it lets go of that afterwards
        weakref.finalize(self.bytes.base, _call_in, os.getpid(), call).atexit = False


def _call_in(process: int, call: Callable[[], object]) -> None:
    if os.getpid() == process:
        call()


def _free_on(node: int) -> int | None:
    """Bytes of a node that are free or in its page cache; None if the system does not say."""
    lines = sysfiles.lines(f"sys/devices/system/node/node{node}/meminfo")
    try:
        fields = {words[2]: int(words[3]) for line in lines if len(words := line.split()) > 3}
    except ValueError:
        return None
    names = ("MemFree:", "Active(file):", "Inactive(file):")
    return 1024 * sum(fields.get(name, 0) for name in names) if "MemFree:" in fields else None


def _place(address: int, nbytes: int, nodes: Sequence[int]) -> None:
    """Ask for the pages of a range on one node, or on several in turn if threads of all of them
    read it. When these have no more, pages come from other nodes: a strict binding would end with
    the kernel killing a process. Where mbind is not permitted, pages go where they are first
    touched."""
    for node in nodes:
        free, share = _free_on(node), nbytes / len(nodes)
        if free is not None and free < share:
            _warn_once_for(
                node,
                f"NUMA node {node} has {free / 2**30:.1f} GiB left for {share / 2**30:.1f} GiB of "
                "packed experts: what does not fit goes to other nodes and is read more slowly",
            )
    number = _SYS_MBIND.get(platform.machine())
    if number is None:
        warn_once("memory is placed by first touch: mbind is not known on this processor")
        return
    mask = (ctypes.c_ulong * 16)()
    for node in nodes:
        mask[node // 64] |= 1 << (node % 64)
    result = _libc().syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE),
        ctypes.c_int(_MPOL_PREFERRED if len(nodes) == 1 else _MPOL_INTERLEAVE),
        mask,
        ctypes.c_ulong(16 * 64),
        ctypes.c_uint(0),
    )
    if result != 0:
        code = ctypes.get_errno()
        name = errno.errorcode.get(code, str(code))
        warn_once(f"memory is placed by first touch: mbind failed with {name} {os.strerror(code)}")


class Workspace:
    """An arena that is handed out in pieces, each of which begins a cache line."""

    def __init__(self, nbytes: int, numa_nodes: Sequence[int] = ()) -> None:
        """An arena of so many bytes, see there."""
        self._arena = Arena(nbytes, numa_nodes)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    def take(self, nbytes: int) -> int:
        """Address of `nbytes` more bytes."""
        at = self._used
        self._used = -(-(at + nbytes) // 64) * 64
        if self._used > self.nbytes:
            raise AssertionError("more memory was taken than had been announced")
        return self._arena.address + at

    def view(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """The array at `address`, which `take` returned."""
        at = int(address) - self._arena.address
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._arena.bytes[at : at + nbytes].view(dtype).reshape(shape)
