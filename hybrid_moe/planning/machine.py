"""The machine that is planned for: memory sizes, GPUs, and how fast its processor is.

The processor's speeds are measured ceilings, taken here or from a receipt of another machine. A
GPU's are assumed from its size, unless they are given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hybrid_moe.text import parse_size


@dataclass(frozen=True)
class GpuClass:
    """What is assumed of a GPU with up to so much memory: the slowest card of that size in use.

    Attributes:
        gib: memory. bandwidth: GB/s. tflops: dense BF16. example: the card.
    """

    gib: int
    bandwidth: float
    tflops: float
    example: str


GPU_CLASSES: tuple[GpuClass, ...] = (
    GpuClass(12, 360, 51, "RTX 3060"),
    GpuClass(16, 448, 62, "RTX 5060 Ti"),
    GpuClass(24, 936, 71, "RTX 3090"),
    GpuClass(32, 1792, 209, "RTX 5090"),
    GpuClass(48, 864, 181, "L40S"),
    GpuClass(80, 2039, 312, "A100"),
    GpuClass(96, 1792, 250, "RTX PRO 6000"),
    GpuClass(141, 4800, 989, "H200"),
    GpuClass(192, 8000, 2250, "B200"),
)
"""By memory. Data sheet figures; `--gpu-bandwidth` replaces the one that matters most."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        nbytes: its memory.
        bandwidth: bytes it reads per second.
        flops: dense BF16 operations per second.
        source: where the two speeds come from.
    """

    nbytes: int
    bandwidth: float
    flops: float
    source: str


@dataclass(frozen=True)
class CpuSpeeds:
    """Ceilings of the processor with all threads that will work.

    Attributes:
        read: bytes per second, blocks of 4 MiB in random order.
        macs: format -> multiply-accumulates per second.
        source: where they come from.
    """

    read: float
    macs: Mapping[str, float]
    source: str


def parse_gpus(texts: Iterable[str], bandwidth: float | None = None) -> tuple[Gpu, ...]:
    """GPUs of "24GB" or "2x24GB"; `bandwidth` in GB/s replaces the assumed one.

    Raises:
        ValueError: a text that is neither.
    """
    gpus: list[Gpu] = []
    for text in texts:
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(.+)", text)
        count = int(match[1] or 1) if match else 0
        if match is None or count < 1:
            raise ValueError(f'GPU "{text}" must be a size (24GB) or a number of them (2x24GB)')
        gpus += [_gpu(parse_size(match[2]), bandwidth)] * count
    return tuple(gpus)


def _gpu(nbytes: int, bandwidth: float | None) -> Gpu:
    fitting = (row for row in GPU_CLASSES if nbytes <= row.gib << 30)
    row = next(fitting, GPU_CLASSES[-1])
    source = f"assumed: {row.example}"
    if bandwidth is not None:
        source = f"bandwidth as given, rest {source}"
    return Gpu(nbytes, (bandwidth or row.bandwidth) * 1e9, row.tflops * 1e12, source)


def measure_cpu(threads: int, seconds: float = 0.3) -> CpuSpeeds:
    """Measure this machine: a few times `seconds`, and 512 MiB of memory meanwhile."""
    from hybrid_moe.cpu_kernels.ceilings.bandwidth import read_ceiling
    from hybrid_moe.cpu_kernels.ceilings.peaks import format_ceilings, op_peaks
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig

    pool = PoolConfig.choose(threads)
    read = read_ceiling("all threads", pool, seconds)
    macs = format_ceilings(op_peaks(pool, seconds=seconds))
    return CpuSpeeds(read.at_random * 1e9, macs, f"measured here with {threads} threads")


def read_receipt(file: Path) -> CpuSpeeds:
    """The ceilings in a receipt of `hybrid-moe bench ceilings --json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such receipt.
    """
    from hybrid_moe.cpu_kernels.ceilings.peaks import format_ceilings

    try:
        document = json.loads(file.read_text("utf-8"))
        reads = {row["where"]: float(row["at_random"]) for row in document["reads"]}
        ops: dict[str, float] = {}
        for row in document["peaks"]:
            ops[row["op"]] = max(ops.get(row["op"], 0.0), 1e9 * float(row["all_threads"]))
        macs = format_ceilings(ops)
        if "BF16" not in macs:
            raise KeyError("peaks of byte_dot and pair_dot")
        source = f"{file.name}: {document['processor']}, {document['threads']} threads"
        return CpuSpeeds(reads["all threads"] * 1e9, macs, source)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} is no receipt of `hybrid-moe bench ceilings --json {file.name}`: {error!r}"
        ) from error


def memory_of_this_machine() -> int:
    """Bytes of RAM that a process may use here: all of it, or what the cgroup allows.

    Raises:
        ValueError: the system tells neither.
    """
    from hybrid_moe.planning.doctor import read_memory

    memory = read_memory()
    amounts = [amount for amount in (memory.total, memory.limit) if amount is not None]
    if not amounts:
        raise ValueError("this system does not tell how much memory it has: say it with --ram")
    return min(amounts)


def huge_pages_here() -> bool:
    """Whether arenas get huge pages on this machine."""
    from hybrid_moe.planning.doctor import huge_page_state

    return huge_page_state() in ("always", "madvise")
