"""Speed and memory of loading a checkpoint into packed experts.

    python bench/load.py [--experts 64] [--threads N] [--directory DIR]

Writes one layer of a DeepSeek-V4-style MXFP4 checkpoint (shape A) and loads it in fresh processes:
from the page cache, from the disk, and from a packed cache on the disk. Files are dropped from the
page cache for the latter two, which load "again" and stand beside plain sequential reads of the
same files just before and after. Then the speed of packing alone, of every format, by one thread
out of memory.

Memory that no process has used for a while can be much slower to get than to fill (a virtual
machine's host may have to find it first). So each round first measures, in another process, how
fast the system hands out memory, and loads twice: "again" loads into memory that the first load has
just given back, where reading and packing are all that is left.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from problem import SHAPES, SOURCES
from weights import random_experts

_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}
_EXPERTS_PER_SHARD = 32
_PAGE = 4096
_PIECE = 16 << 20


def write_checkpoint(directory: Path, experts: int) -> None:
    """`experts` of shape A under DeepSeek-V4's names and dtypes, in shards with an index."""
    import torch
    from safetensors.torch import save_file

    sources = random_experts(SHAPES["A"], "MXFP4")
    weight_map: dict[str, str] = {}
    for first in range(0, experts, _EXPERTS_PER_SHARD):
        tensors = {}
        for expert in range(first, min(first + _EXPERTS_PER_SHARD, experts)):
            for ours, theirs in _PROJECTIONS.items():
                matrix = sources[expert % SOURCES][ours]
                assert matrix.scales is not None
                stem = f"layers.0.ffn.experts.{expert}.{theirs}"
                codes, scales = (torch.from_numpy(a.copy()) for a in (matrix.codes, matrix.scales))
                tensors[f"{stem}.weight"] = codes.view(torch.int8)
                tensors[f"{stem}.scale"] = scales.view(torch.float8_e8m0fnu)
        name = f"model-{first // _EXPERTS_PER_SHARD:05d}.safetensors"
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_once(directory: Path) -> None:
    """Bring the files into the page cache, 16 MiB at a time."""
    buffer = bytearray(16 << 20)
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def files_of(directory: Path) -> list[Path]:
    """What is read of a checkpoint, or of a packed cache."""
    return sorted([*directory.glob("*.safetensors"), *directory.glob("*.packed")])


def drop_from_cache(directory: Path) -> None:
    """Let the kernel forget the files' pages, written ones too."""
    for file in files_of(directory):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sequential_read(directory: Path, threads: int, most: int = 4 << 30) -> float:
    """GB/s at which files come from the disk: each thread reads its part of them in order, 16 MiB
    at a time, at most `most` bytes in all."""
    drop_from_cache(directory)
    pieces = [
        (file, at) for file in files_of(directory) for at in range(0, file.stat().st_size, _PIECE)
    ][: -(-most // _PIECE)]
    share = -(-len(pieces) // threads)

    def read(thread: int) -> int:
        buffer, done = memoryview(mmap.mmap(-1, _PIECE)), 0
        for file, at in pieces[thread * share : (thread + 1) * share]:
            descriptor = os.open(file, os.O_RDONLY)
            done += os.preadv(descriptor, [buffer], at)
            os.close(descriptor)
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(read, range(threads)))
    speed = nbytes / (time.perf_counter() - begin) / 1e9
    drop_from_cache(directory)
    return speed


def packing_speeds(rows: int = 2048, inputs: int = 4096) -> list[dict[str, Any]]:
    """Bytes of strips that one thread packs in a second, of every format, from rows in memory."""
    from hybrid_moe.cpu_kernels.memory import Arena
    from hybrid_moe.cpu_kernels.strips.pack import pack_rows
    from hybrid_moe.formats.strips import STRIP_ROWS, strip_layout
    from hybrid_moe.formats.table import FORMATS
    from hybrid_moe.formats.tensors import Matrix

    rng = np.random.default_rng(0)
    found = []
    for fmt in FORMATS.values():
        planes = {p.name: (p.shape(rows, inputs), p.dtype) for p in fmt.planes}
        made = {
            name: rng.integers(0, 256, (shape[0], shape[1] * kind.itemsize), np.uint8).view(kind)
            for name, (shape, kind) in planes.items()
        }
        matrix, layout = Matrix(**made, scale_rows=fmt.scale_rows), strip_layout(fmt, inputs)
        strips = range(rows // STRIP_ROWS)
        arena = Arena(len(strips) * layout.nbytes)
        seconds = []
        for _ in range(12):  # the first ones compile, and get the memory
            begin = time.perf_counter()
            pack_rows(arena.address, strips, layout, matrix, rows)
            seconds.append(time.perf_counter() - begin)
        found.append({"format": fmt.name, "GBps": arena.nbytes / statistics.median(seconds) / 1e9})
    return found


def first_touch(nbytes: int) -> float:
    """GB/s at which the system hands out anonymous memory, huge pages where it has them."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    start = time.perf_counter()
    view[::_PAGE] = 1
    return nbytes / (time.perf_counter() - start) / 1e9


class PeakMemory:
    """Highest resident anonymous memory of this process, sampled by a thread (bytes)."""

    def __init__(self, interval: float = 0.002) -> None:
        self.peak = self.now()
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @staticmethod
    def now() -> int:
        memory = psutil.Process().memory_info()
        return int(memory.rss - memory.shared)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())


def load(
    directory: Path, threads: int, cache: str | None = None, dropped: Path | None = None
) -> dict[str, Any]:
    """Load the layer in this process, a fresh one, twice, and report. `dropped`: a folder whose
    files come from the disk the second time."""
    begin = time.perf_counter()
    from hybrid_moe.cpu_kernels.layer import ExpertLayer
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig
    from hybrid_moe.formats.mx import MXFP4
    from hybrid_moe.loaders import Checkpoint, load_layer
    from hybrid_moe.runtime.packed_layers import cache_at, load_packed_layer

    packed_cache = cache_at(cache)
    imported = time.perf_counter()
    shape = SHAPES["A"]

    def once() -> tuple[int, float]:
        """Packed bytes, seconds."""
        start = time.perf_counter()
        source = Checkpoint.open(directory).layer(0)
        layer = ExpertLayer(
            MXFP4, source.num_experts, shape.hidden, shape.intermediate, pool=PoolConfig(threads)
        )
        wanted = np.ones(source.num_experts, bool)
        layer.allocate(wanted, biases=source.has_bias)
        identity = np.arange(source.num_experts)
        if packed_cache is None:
            load_layer(source, identity, wanted, layer.load, formats=MXFP4, threads=threads)
        else:
            formats = source.formats
            load_packed_layer(packed_cache, source, formats, identity, wanted, layer, threads)
        seconds = time.perf_counter() - start
        nbytes = layer.nbytes
        layer.close()
        return nbytes, seconds

    baseline = PeakMemory.now()
    with PeakMemory() as memory:
        packed, seconds = once()
    if dropped is not None:
        drop_from_cache(dropped)
    _, again = once()
    return {
        "import_s": imported - begin,
        "load_s": seconds,
        "GBps": packed / seconds / 1e9,
        "again_GBps": packed / again / 1e9,
        "packed_bytes": packed,
        "peak_anonymous_bytes": memory.peak - baseline,
        "peak_over_packed": (memory.peak - baseline) / packed,
    }


def in_fresh_process(*arguments: str, script: str = __file__) -> dict[str, Any]:
    """Run a file of this folder with `arguments`; its last line is JSON."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def benchmark(directory: Path, experts: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rounds of (hand out memory, load), each in a process of its own."""
    write_checkpoint(directory, experts)
    cache = directory / "packed"
    words = ["--load", str(directory), f"--threads={threads}"]
    in_fresh_process(*words, f"--cache={cache}")  # builds it
    results = []
    for _ in range(rounds):
        read_once(directory)
        nbytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        touch = in_fresh_process("--touch", str(nbytes))
        point = {**touch, **in_fresh_process(*words)}
        disk = [sequential_read(directory, threads)]
        again = in_fresh_process(*words, f"--dropped={directory}")
        point["from_disk_GBps"] = again["again_GBps"]
        disk.append(sequential_read(directory, threads))
        again = in_fresh_process(*words, f"--cache={cache}", f"--dropped={cache}")
        point["from_cache_GBps"] = again["again_GBps"]
        results.append({**point, "disk_GBps": statistics.mean(disk)})
    return results


def main() -> None:
    from harness import parser
    from rich.console import Console
    from tables import LOAD, PACKING, show

    from hybrid_moe.cpu_kernels.pool.topology import usable_cores
    from hybrid_moe.planning.receipt import processor, receipt, write_receipt

    arguments = parser(__doc__)
    arguments.add_argument("--experts", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=usable_cores())
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--directory", help="where to write the checkpoint; a temporary one if not given"
    )
    arguments.add_argument("--load", help=argparse.SUPPRESS)
    arguments.add_argument("--cache", help=argparse.SUPPRESS)
    arguments.add_argument("--dropped", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--touch", type=int, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.touch:
        print(json.dumps({"first_touch_GBps": first_touch(args.touch)}))
        return
    if args.load:
        print(json.dumps(load(Path(args.load), args.threads, args.cache, args.dropped)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        points = benchmark(Path(name), args.experts, args.threads, args.rounds)
    speeds = packing_speeds()
    title = f"loading MXFP4, {args.threads} threads, {processor()}"
    rounds = ({"round": i, **p} for i, p in enumerate(points, 1))
    show(Console(width=140), title, LOAD, rounds)
    show(Console(width=140), "packing, 1 thread", PACKING, speeds)
    packed = points[0]["packed_bytes"] / 1e9
    print(f"{packed:.3f} GB packed. Peak of anonymous memory, less what was there after import.")
    write_receipt(args.json, receipt("load", points=points, packing=speeds, threads=args.threads))


if __name__ == "__main__":
    main()
