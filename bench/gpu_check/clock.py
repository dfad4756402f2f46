"""Time on the GPU: a CUDA graph of several calls with different inputs, replayed.

Inputs change from call to call, so that weights come from memory and not from the cache of the call
before; a graph leaves no host between the calls. Without a GPU a call runs once, untimed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


def on_gpu() -> bool:
    """Whether there is something to measure."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where benchmarks run."""
    return torch.device("cuda", 0) if on_gpu() else torch.device("cpu")


def time_us(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float | None:
    """Median microseconds of one of `calls`, which are queued one behind the other; None without a
    GPU, where they run once.
    """
    if not on_gpu():
        calls[0]()
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiled and loaded before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept = []  # or the next call would get the memory of the last one's output, warm in the cache
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    graph.reset()
    return statistics.median(times)
