"""Load every layer of a checkpoint through `KTMoEWrapper` and report the memory that it takes.

Runs in a process of its own: `python -m tests.hybrid_moe.planning.resident WARM_UP MODEL METHOD
HUGE_PAGES` prints JSON with `arenas` (resident bytes of the arenas' pages, by mincore) and `growth`
(of the process's resident set while loading). Without huge pages, the kernel is told so first.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.wrapper import KTMoEWrapper

_PR_SET_THP_DISABLE = 41
_LIBC = ctypes.CDLL(None, use_errno=True)


def wrappers(directory: Path, method: str) -> Iterator[KTMoEWrapper]:
    """A loaded wrapper for each layer of experts."""
    checkpoint = Checkpoint.open(directory)
    for number in checkpoint.layers:
        layer = checkpoint.layer(number)
        wrapper = KTMoEWrapper(
            number, layer.num_experts, 1, layer.hidden, layer.intermediate, method=method,
            weight_path=directory, cpuinfer_threads=1, threadpool_count=1,
        )  # fmt: skip
        wrapper.load_weights()
        yield wrapper


def resident_bytes(arena: Arena) -> int:
    """Bytes of the arena's pages that are in memory, to the end of its last huge page."""
    pages = -(-arena.nbytes // (2 << 20)) * (2 << 20) // mmap.PAGESIZE
    present = (ctypes.c_ubyte * pages)()
    address, length = ctypes.c_void_p(arena.address), ctypes.c_size_t(pages * mmap.PAGESIZE)
    if _LIBC.mincore(address, length, present):
        raise OSError(ctypes.get_errno(), "mincore")
    return mmap.PAGESIZE * sum(byte & 1 for byte in present)


def main(warm_up: Path, model: Path, method: str, huge_pages: bool) -> dict[str, int]:
    """Load `warm_up`, then measure `model`."""
    if not huge_pages and _LIBC.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    kept = list(wrappers(warm_up, "auto"))
    gc.collect()
    before = psutil.Process().memory_info().rss
    loaded = list(wrappers(model, method))
    gc.collect()
    after = psutil.Process().memory_info().rss
    arenas = [arena for wrapper in loaded for arena in wrapper._layer._arenas]
    del kept
    return {"arenas": sum(map(resident_bytes, arenas)), "growth": after - before}


if __name__ == "__main__":
    paths, options = map(Path, sys.argv[1:3]), sys.argv[3:]
    print(json.dumps(main(*paths, options[0], options[1] == "huge")))
