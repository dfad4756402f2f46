"""What kt-kernel hangs on its wrapper and belongs to the process: graphs, buffers, checkpoints."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.runtime import arguments, checkpoint_cache
from hybrid_moe.streams.buffers import BUFFERS


class ProcessWide:
    """The part of `KTMoEWrapper` that needs no layer."""

    _capture_batch_sizes: ClassVar[list[int]] = []

    @staticmethod
    def set_capture_batch_sizes(capture_bs: list[int]) -> None:
        """Announce the batch sizes of CUDA graphs. Graphs of other sizes work as well: whatever a
        capture uses stays where it is."""
        ProcessWide._capture_batch_sizes = arguments.batch_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The announced batch sizes, ascending."""
        return list(ProcessWide._capture_batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the pinned buffers that no CUDA graph uses, and the memory of jobs that are over."""
        BUFFERS.clear(torch.cuda.synchronize)
        IDLE.clear()

    @staticmethod
    def force_release_loader() -> None:
        """Close the checkpoints that were opened for loading; a later load opens them anew."""
        checkpoint_cache.release()
