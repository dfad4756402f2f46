"""Affinity masks: which processors the process was given, and which a thread is bound to.

A mask belongs to a thread, but we ask about the process. We take the mask of its main thread: that
is what the process was started with (taskset, numactl, a cpuset) or has set for itself since. The
thread that calls us may have been bound to one processor for reasons of its own.

An OpenMP runtime changes that mask: with OMP_PROC_BIND or its like, `import torch` binds the thread
that loads it, most often the main thread, to the first of OpenMP's places. The places are made from
the mask that the process had before, so they still show it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterable

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.pool import cgroups
from hybrid_moe.logs import warn_once

BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""With any of these, an OpenMP runtime may bind threads; without, none does."""

_RUNTIME = re.compile(r"\S*/lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/\s]*$")


def process_cpus() -> tuple[int, ...]:
    """Logical processors that this process may use, ascending: see the module's description."""
    mask = _mask_of(os.getpid())
    if not mask:
        return _online()
    if any(name in os.environ for name in BINDING_VARIABLES):
        mask = _before_openmp(mask)
    return tuple(sorted(mask))


def bound_to() -> int | None:
    """The processor that the calling thread is bound to, None if it may run on several."""
    mask = _mask_of(0)
    return next(iter(mask)) if len(mask) == 1 else None


def bind_thread(cpus: Iterable[int]) -> None:
    """Let the calling thread run on `cpus` only; if the system refuses, it runs as before."""
    try:
        os.sched_setaffinity(0, cpus)  # 0 is this thread
    except OSError as error:
        warn_once(f"worker threads are not bound to processors: {error.strerror}")


def _mask_of(pid: int) -> frozenset[int]:
    """A thread's mask; empty if the system does not say."""
    try:
        return frozenset(os.sched_getaffinity(pid))
    except OSError as error:
        warn_once(
            f"the affinity mask cannot be read ({error.strerror}): every processor counts as usable"
        )
        return frozenset()


def _online() -> tuple[int, ...]:
    """Every processor that the process might use, where its mask is unknown."""
    return cgroups.cpuset() or tuple(range(os.cpu_count() or 1))


def _before_openmp(mask: frozenset[int]) -> frozenset[int]:
    """The mask that this process had before an OpenMP runtime bound its main thread, if one did."""
    for places, processors in _openmp_places():
        if mask not in places:
            continue  # bound on purpose, and not by this runtime
        before = frozenset().union(*places)
        cpuset = frozenset(cgroups.cpuset())
        # places may be fewer than the process had (OMP_PLACES="{0},{1}"), which binds OpenMP only
        return cpuset if len(before) < processors == len(cpuset) else before
    _warn_of_inherited_binding(mask)
    return mask


def _warn_of_inherited_binding(mask: frozenset[int]) -> None:
    """Warn of a mask that the process may have inherited from a thread that OpenMP had bound."""
    allowed = cgroups.cpuset()
    if len(mask) == 1 < len(allowed):
        warn_once(
            f"this process may use processor {min(mask)} only, of {len(allowed)}, and OpenMP's "
            f"binding is on ({', '.join(n for n in BINDING_VARIABLES if n in os.environ)}): if the "
            "program that started it was bound by that, unset the variable"
        )


def _openmp_places() -> list[tuple[list[frozenset[int]], int]]:
    """Places of each OpenMP runtime in this process that binds threads, and the number of
    processors that it found when it was loaded."""
    files = {m[0] for line in sysfiles.lines("proc/self/maps") if (m := _RUNTIME.search(line))}
    found = [_places_of(file) for file in sorted(files)]
    return [entry for entry in found if entry is not None]


@functools.lru_cache(maxsize=8)
def _places_of(file: str) -> tuple[list[frozenset[int]], int] | None:
    """By OpenMP 4.5's API; None from a runtime that is older, or does not bind."""
    try:
        runtime = ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        places = []
        for place in range(runtime.omp_get_num_places()):
            cpus = (ctypes.c_int * runtime.omp_get_place_num_procs(place))()
            runtime.omp_get_place_proc_ids(place, cpus)
            places.append(frozenset(cpus))
        return (places, int(runtime.omp_get_num_procs())) if places else None
    except (OSError, AttributeError) as error:
        warn_once(f"{file} does not tell the processors that it found: {error}")
        return None
