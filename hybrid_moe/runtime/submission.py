"""What `submit` has started in a layer, until `sync` asks for it or it is dropped."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from hybrid_moe.cpu_kernels.job import Job
from hybrid_moe.runtime.hot_half import HotJob
from hybrid_moe.runtime.streamed_layer import StreamedBatch
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.staging import StreamJob, StreamZeros

logger = logging.getLogger(__name__)

Started = Job[torch.Tensor] | StreamJob | StreamZeros
"""Experts of a layer at work: on CPU tensors, or in the order of a GPU's stream."""


def result_of(job: Started, stream: Stream | None) -> torch.Tensor:
    """The output, BF16 [B, H] on the batch's device, owned by the caller.

    Args:
        stream: that of the call; None on the CPU.
    """
    if isinstance(job, Job):
        return job.wait()
    assert stream is not None
    return job.result(stream)


def cold_part(job: Started, stream: Stream | None) -> torch.Tensor | None:
    """The output of a job that leaves float32 sums; None where nothing ran."""
    return None if isinstance(job, StreamZeros) else result_of(job, stream)


def _add(output: torch.Tensor, other: torch.Tensor, stream: Stream | None) -> torch.Tensor:
    """`output`, to which `other` has been added."""
    if stream is None:
        return output.add_(other)
    stream.add(output, other)
    return output


def discard(job: Started | None, layer_idx: int) -> None:
    """Drop a job that nobody will ask for; what went wrong in it is logged and raised nowhere."""
    try:
        if isinstance(job, Job):
            job.wait()
        elif job is not None:
            job.discard()
    except RuntimeError as error:
        logger.warning("layer %d: a job that was dropped had failed: %s", layer_idx, error)


@dataclass
class Submission:
    """A batch under way.

    Attributes:
        shape: of the batch, (B, H).
        device: of the batch.
        job: this layer's experts on the CPU.
        hot: those on the GPU, where the layer has both halves.
        incoming: what the layer before has deferred.
        fault: what sync will raise.
        streamed: how long it takes, where experts were sent for it.
    """

    __slots__ = ("device", "fault", "hot", "incoming", "job", "shape", "streamed")

    shape: torch.Size
    device: torch.device
    job: Started
    incoming: Started | None
    fault: Exception | None
    hot: HotJob | None
    streamed: StreamedBatch | None

    def result(self, stream: Stream | None) -> torch.Tensor:
        """The output, with what came in from the layer before; or the fault is raised."""
        hot, streamed = self.hot, self.streamed
        if streamed is None:
            return self._result(hot, stream)
        output = self._result(hot, stream)
        streamed.over(stream)
        return output

    def _result(self, hot: HotJob | None, stream: Stream | None) -> torch.Tensor:
        output = result_of(self.job, stream) if hot is None else cold_part(self.job, stream)
        if (fault := self.fault) is not None:
            # a new one: its traceback would lead back to one that is kept here, and keep us
            raise type(fault)(*fault.args)
        incoming, self.incoming = self.incoming, None
        if incoming is not None:
            earlier = result_of(incoming, stream) if hot is None else cold_part(incoming, stream)
            if output is None:
                output = earlier
            elif earlier is not None:
                output = _add(output, earlier, stream)
        if hot is not None:
            return hot.result(output, stream)
        assert output is not None
        return output
