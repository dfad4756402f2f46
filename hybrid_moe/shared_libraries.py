"""Shared libraries that this process has loaded already."""

from __future__ import annotations

import ctypes
from pathlib import Path


def loaded_library(name: str, maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL:
    """The shared library of this process whose file name begins with `name`.

    A second copy of a runtime would have contexts of its own; so the path is taken from what is
    mapped, never from a search.

    Raises:
        RuntimeError: no such library is loaded.
    """
    for line in maps.read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name):
            return ctypes.CDLL(str(path))
    raise RuntimeError(
        f"no {name} is loaded in this process: CUDA tensors need a torch that is built for CUDA "
        "with the shared CUDA runtime"
    )
