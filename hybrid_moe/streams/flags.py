"""Whether memory flags can hand over jobs on this GPU: they are tried, eagerly and in a graph.

No single property says whether they work: an old driver, a virtual machine, a GPU without 64-bit
stream memory operations, or graphs that cannot hold them make them fail. The trial is the use: the
stream writes a word, waits for the host's answer and clears it, and so does each of three replays
of a captured graph.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

HANDOVER = "HYBRID_MOE_HANDOVER"
"""Environment variable: "flags" (the default, where they work) or "host" for host functions."""

_CAN_USE_64_BIT = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
_PATIENCE_S = 2.0


class TrialError(RuntimeError):
    """Memory flags do not work here; the message says what happened."""


def flags_work(device: torch.device, *, may_try: bool) -> bool:
    """Whether `device` hands over jobs by flags.

    Args:
        may_try: False during a capture, when nothing can be tried: buffers that an untried device
            gets then are handed over by host functions for as long as the graph may be replayed.
            The next call outside a capture tries, for all buffers after that.

    Raises:
        ValueError: the environment variable is neither "flags" nor "host".
    """
    wanted = os.environ.get(HANDOVER) or "flags"
    if wanted not in ("flags", "host"):
        raise ValueError(f'{HANDOVER}={wanted!r} must be "flags" (the default) or "host"')
    if wanted == "host":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index in _tried:
        return _tried[index]
    if not may_try:
        if index not in _untried:
            _untried.add(index)
            logger.warning(
                "GPU %d: its first use is in a capture, where memory flags cannot be tried: this "
                "graph's jobs are handed over by host functions; run the layers once before the "
                "capture for flags",
                index,
            )
        return False
    try:
        with torch.cuda.device(index):
            try_flags(torch.device("cuda", index))
        _tried[index] = True
    except (RuntimeError, AttributeError, OSError) as error:
        _tried[index] = False
        logger.warning(
            "GPU %d: jobs are handed over by host functions, since memory flags do not work: %s",
            index,
            error,
        )
    return _tried[index]


_tried: dict[int, bool] = {}
_untried = set[int]()  # devices whose first use was in a capture
_kept: list[torch.Tensor] = []  # a stream that fails a trial may still write


def try_flags(device: torch.device) -> None:
    """Hand a word back and forth, eagerly and by three replays of a graph.

    Raises:
        TrialError, RuntimeError, AttributeError, OSError: they do not work, and why.
    """
    from hybrid_moe.streams.cuda import CudaStream, driver, new_stream

    able = ctypes.c_int()
    code = driver().cuDeviceGetAttribute(ctypes.byref(able), _CAN_USE_64_BIT, device.index)
    if code != 0 or not able.value:
        raise TrialError("the GPU has no 64-bit stream memory operations")
    stream = new_stream(device)
    words = stream.pinned((2,), torch.int64)
    _kept.append(words)

    def queue(on: CudaStream) -> None:
        on.write_value(words[0].data_ptr(), 7)
        on.wait_value(words[1].data_ptr(), 1)
        on.write_value(words[1].data_ptr(), 0)

    try:
        exchange(words, lambda: queue(stream), stream.record)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream._stream, capture_error_mode="thread_local"):
            queue(stream)
        for _ in range(3):
            with stream:
                exchange(words, graph.replay, stream.record)
    finally:
        words[1] = 1  # whatever happened, no stream stays behind waiting


class Queryable(Protocol):
    """An event of a stream."""

    def query(self) -> bool:
        """Whether the stream has come to it."""


def exchange(
    words: torch.Tensor, start: Callable[[], object], record: Callable[[], Queryable]
) -> None:
    """One hand-over over two words: the stream's, and the host's answer.

    Raises:
        TrialError: the stream did not do its part.
    """
    seen = words.numpy()
    seen[0] = 0
    start()
    end = record()
    if not _until(lambda: bool(seen[0] == 7)):
        raise TrialError("the host does not see what a stream writes")
    time.sleep(0.001)
    if end.query():
        raise TrialError("a stream did not wait for a value")
    seen[1] = 1
    if not _until(end.query):
        raise TrialError("a stream does not see what the host writes")
    if seen[1] != 0:
        raise TrialError("a stream did not clear a value")


def _until(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within some patience."""
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
    return True
