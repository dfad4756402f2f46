"""Passes of a few tokens on raw addresses: what a decode step on CPU tensors pays in Python.

Up to SMALL_TOKENS tokens are routed and encoded while they are submitted, so nothing has to be
copied first, and what remains is one call of compiled code to start and one to wait.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.job import INLINE_ENCODE_TOKENS as SMALL_TOKENS
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup

__all__ = ["SMALL_TOKENS", "SmallJob", "SmallPass", "SmallShape"]


@dataclass(frozen=True)
class SmallShape(JobShape):
    """The shape of a job whose inputs are elsewhere. Equal ones are the same object."""


_shapes: dict[SmallShape, SmallShape] = {}


def small_shape(shape: JobShape) -> SmallShape:
    """The small shape of these sizes."""
    values = {field.name: getattr(shape, field.name) for field in fields(JobShape)}
    small = SmallShape(**values)
    return _shapes.setdefault(small, small)


class SmallJob:
    """Memory of one pass."""

    def __init__(self, shape: SmallShape) -> None:
        self.shape = shape
        self._workspace = Workspace(shape.nbytes)
        self._template = shape.template(self._workspace)
        self.slots = memoryview(self._template)
        self.address = int(self._template.ctypes.data)

    @property
    def nbytes(self) -> int:
        return self._workspace.nbytes


class SmallPass:
    """A pass under way.

    Attributes:
        ignored: ids below 0 or at and above the number of experts.
        missing: an expert that is neither loaded nor skipped, so that nothing runs; or -1.
    """

    __slots__ = ("_group", "_job", "_sequence", "ignored", "missing")

    def __init__(
        self,
        group: PoolGroup,
        job: SmallJob,
        descriptor: int,
        call: tuple[int, int, int, int, int, int],
        owned: object,
    ) -> None:
        """Start `job` for a layer's descriptor.

        Args:
            call: T, and the addresses of x, ids, weights, skip and out, see `ExpertLayer.small`.
            owned: kept alive until the pass is over.
        """
        slots = job.slots
        slots[f.J_LAYER] = descriptor
        (
            slots[f.J_TOKENS],
            slots[f.J_X],
            slots[f.J_IDS],
            slots[f.J_WEIGHTS],
            slots[f.J_SKIP],
            slots[f.J_OUT],
        ) = call
        self._group, self._job = group, job
        self._sequence, self.ignored = group.launch(job.address, (owned, job))
        self.missing = -1 if self._sequence > 0 else -self._sequence
        if self.missing >= 0:
            group.idle.give_back(job)

    def wait(self) -> None:
        """Return when the output is there, working on it meanwhile. To be called once."""
        if self.missing < 0:
            self._group.wait(self._sequence)
            self._group.idle.give_back(self._job)
