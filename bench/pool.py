"""Fork-join: how long an empty job takes, between spinning threads and from sleep.

    python bench/pool.py --threads 2

An empty job routes no token (all ids -1), so what is left is the launch, the tasks' bookkeeping,
the barriers and the wait. All samples are taken in compiled code; what Python adds to a forward
pass of the same batch is a column of its own. Four cases:

    hot     jobs follow each other; idle workers spin
    asleep  every worker sleeps on the futex before each job
    caller works   the submitter is worker 0 (CPU tensors): whoever is first takes the tasks
    handed over    the submitter only waits, so another thread must see the job, run it and be seen

The ceiling of a job that is handed over is a bare signal between two threads: a store that the
other sees and answers ("hot"), or a futex wake and the answer of the thread that slept ("asleep").
Layer "tiny" has one task for each thread and nothing else; on layer "A" these
write a longer row of zeros.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import fork_join
import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from harness import make_layer, parse_numbers, parser
from problem import SHAPES, Shape
from rich.console import Console
from tables import POOL, POOL_WANTED, show

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions
from hybrid_moe.cpu_kernels.jit.driver import Driver
from hybrid_moe.cpu_kernels.jit.translate import translate
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import FUTEX_NUMBERS, PoolGroup
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.planning.receipt import processor, receipt, write_receipt

Samples = npt.NDArray[np.int64]

LOOPS = ("fork_join", "ask", "answer", "count_up")


@dataclass(frozen=True)
class Point:
    """One case. Microseconds; `signal_us` is the bare signal where a thread has to answer,
    `python_us` what Python adds to a forward pass."""

    job: str
    threads: int
    state: str
    caller: str
    median_us: float
    p99_us: float
    signal_us: float | None
    python_us: float | None


def summary(samples: Samples) -> tuple[float, float]:
    """Median and 99th percentile of nanoseconds, in microseconds."""
    median, late = np.percentile(samples, (50, 99)) / 1e3
    return float(median), float(late)


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """The calling thread on one processor, where no worker is."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@functools.lru_cache(maxsize=1)
def compiled() -> Mapping[str, Callable[..., int]]:
    """The loops of `fork_join.py` as Python callables that release the GIL."""
    target = Target(cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten())
    loops: dict[str, Driver[..., None]] = {name: getattr(fork_join, name) for name in LOOPS}
    addresses = compile_functions(translate(loops), target, LOOPS, "fork_join", program=True)
    return {
        name: ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(loop.parameters))(
            addresses[name]
        )
        for name, loop in loops.items()
    }


def bare_signal(loops: Mapping[str, Callable[..., int]], asleep: bool, count: int) -> Samples:
    """Nanoseconds of a signal to a thread on another processor and back.

    Raises:
        ValueError: this process may use one processor only.
    """
    here, there = PoolConfig(2).worker_cpus()
    signal = fork_join.Signal.new()
    at = signal.address
    samples = np.zeros(count, np.int64)
    futex = FUTEX_NUMBERS[platform.machine()]

    def answer() -> None:
        os.sched_setaffinity(0, {there})  # 0 is this thread
        loops["answer"](at, futex, int(asleep), count)

    other = threading.Thread(target=answer)
    other.start()
    with pinned(here):
        loops["ask"](at, futex, int(asleep), samples.ctypes.data, count)
        other.join()
    return samples


def tiny_shape(threads: int) -> Shape:
    """One task for each thread, and nothing else: where no expert is active a task zeroes 256 bytes
    of output, two strips of bf16."""
    return Shape("tiny", "", hidden=2 * STRIP_ROWS * threads, intermediate=32, experts=1, top_k=1)


def empty_batch(
    layer: ExpertLayer,
) -> tuple[npt.NDArray[np.uint16], Samples, npt.NDArray[np.float32]]:
    """One token that is routed nowhere."""
    x = np.zeros((1, layer.hidden), np.uint16)
    return x, np.full((1, 1), -1, np.int64), np.ones((1, 1), np.float32)


def time_jobs(
    loops: Mapping[str, Callable[..., int]],
    layer: ExpertLayer,
    asleep: bool,
    caller_works: bool,
    count: int,
) -> Samples:
    """Nanoseconds of `count` empty jobs of the layer, in compiled code."""
    x, ids, weights = empty_batch(layer)
    layer.forward(x, ids, weights)  # starts the threads
    ready = layer._ready()
    group = ready.group
    job = JobMemory.new(layer.job_shape(1, 1))
    out = np.zeros_like(x)
    at = [array.ctypes.data for array in (x, ids, weights)]
    job.fill(ready.descriptor.address, Batch(1, 1, *at, skip=0, out=out.ctypes.data))
    samples = np.zeros(count, np.int64)
    sleepers = sleeping_workers(group) if asleep else 0
    arguments = (int(caller_works), sleepers, samples.ctypes.data, count)
    with pinned(layer.pool.worker_cpus()[0]):
        loops["fork_join"](group.address, job.address, *arguments)
    assert not out.any()
    return samples


def sleeping_workers(group: PoolGroup) -> int:
    """Threads that sleep when the group is idle: all but a caller that works."""
    return group.config.threads - int(group.caller_works)


def time_python(layer: ExpertLayer, count: int) -> Samples:
    """Nanoseconds of `ExpertLayer.forward` with the same empty batch, Python included."""
    batch = empty_batch(layer)
    samples = np.zeros(count, np.int64)
    with pinned(layer.pool.worker_cpus()[0]):
        for i in range(count):
            begin = time.perf_counter_ns()
            layer.forward(*batch)
            samples[i] = time.perf_counter_ns() - begin
    return samples


def measure(threads: int, shapes: list[Shape], count: int) -> list[Point]:
    """All cases of all shapes with one number of threads."""
    loops = compiled()
    states = {"hot": False, "asleep": True} if threads > 1 else {"hot": False}
    callers = (
        {"caller works": True, "handed over": False} if threads > 1 else {"caller works": True}
    )
    signals = {
        state: summary(bare_signal(loops, asleep, count))[0]
        for state, asleep in states.items()
        if threads > 1
    }
    points = []
    for shape in shapes:
        one_expert = dataclasses.replace(shape, experts=1, top_k=1)
        layer = make_layer(one_expert, "MXFP4", PoolConfig(threads))
        for state, asleep in states.items():
            for caller, works in callers.items():
                time_jobs(loops, layer, asleep, works, max(1, count // 10))  # warm-up
                median, late = summary(time_jobs(loops, layer, asleep, works, count))
                python = None
                if not asleep and works:
                    python = summary(time_python(layer, count))[0] - median
                signal = None if works else signals[state]
                points.append(
                    Point(shape.name, threads, state, caller, median, late, signal, python)
                )
        layer.close()
    return points


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=parse_numbers, default=str(usable_cores()))
    arguments.add_argument("--samples", type=int, default=2000, help="jobs of each case")
    args = arguments.parse_args()
    points = []
    for threads in args.threads:
        points += measure(threads, [tiny_shape(threads), SHAPES["A"]], args.samples)
    console = Console(width=120)
    rows = [asdict(p) for p in points]
    show(console, f"fork-join of an empty job, microseconds, {processor()}", POOL, rows)
    console.print(POOL_WANTED)
    write_receipt(args.json, receipt("pool", points=rows))


if __name__ == "__main__":
    main()
