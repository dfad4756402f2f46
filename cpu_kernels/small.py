"""Passes of a few tokens on raw addresses: what a decode step on CPU tensors pays in Python.

Up to SMALL_TOKENS tokens are routed and encoded while they are submitted, so nothing has to be
copied first, and what remains is one call of compiled code to start and one to wait. This is the
only place where a microsecond of Python counts; hence the plain lists and few calls.
"""

from __future__ import annotations

import os

from hybrid_moe.cpu_kernels.drivers.records import Job
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.tuning import INLINE_ENCODE_TOKENS as SMALL_TOKENS

__all__ = ["SMALL_TOKENS", "SmallJob", "SmallPass", "idle_jobs"]


class SmallJob:
    """Memory of one pass whose inputs are elsewhere."""

    __slots__ = ("_template", "_workspace", "address", "words")

    def __init__(self, shape: JobShape) -> None:
        self._workspace = Workspace(shape.nbytes)
        self._template = shape.template(self._workspace)
        self.words = self._template.words
        self.address = self._template.address


_idle: dict[JobShape, list[SmallJob]] = {}
os.register_at_fork(after_in_child=_idle.clear)  # the child has no mapping of their memory


def idle_jobs(shape: JobShape) -> list[SmallJob]:
    """Jobs of this shape that nobody uses; all layers share them. As many as were ever under way
    at the same time."""
    return _idle.setdefault(shape, [])


class SmallPass:
    """A pass under way.

    Attributes:
        ignored: ids below 0 or at and above the number of experts.
        missing: an expert that is neither loaded nor skipped, so that nothing runs; or -1.
    """

    __slots__ = ("_group", "_idle", "_job", "_sequence", "ignored", "missing")

    def __init__(
        self, group: PoolGroup, job: SmallJob, idle: list[SmallJob], owned: object
    ) -> None:
        """Start `job`, which is filled in.

        Args:
            idle: where the job goes afterwards.
            owned: kept alive until the pass is over.
        """
        self._group, self._job, self._idle = group, job, idle
        self._sequence, self.ignored = group.launch(job.address, (owned, job))
        self.missing = -1
        if self._sequence <= 0:
            self.missing = -self._sequence
            idle.append(job)

    def wait(self) -> None:
        """Return when the output is there, working on it meanwhile. To be called once."""
        if self._sequence > 0:
            self._group.wait(self._sequence)
            self._idle.append(self._job)


fill = Job.writer("layer", "tokens", "x", "ids", "weights", "skip", "out")
"""`fill(job.words, ...)`: addresses as of `ExpertLayer.small`."""
