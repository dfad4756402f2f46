"""One job for the linear layers of one input: q, k and v.

A job costs what it costs to start and end it, about what reading a small matrix does. Layers that
take the same input can be one job, of which the first of them brings the outputs of all. Which they
are is learned: linear layers of one parent that were called one after another with the same input
are computed together from then on, by the first. The others take their part if their input has the
same bytes as that of the first had; an adapter, a hook, or a change of the input in between makes
it another input, and they compute alone. So nothing depends on what was learned but time, and the
bits are those of layers alone, as `DenseLayer` promises.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch

from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.integrations.transformers.dense.held import HeldMatrix

MOST_ELEMENTS = 1 << 16
"""Of an input that is shared: 22 tokens of 2880. Comparing its 128 KiB twice and keeping a copy
take some 15 us; two jobs less save that much, which is nothing beside the products of more tokens.
"""

_LOOKS = 8
"""Calls without a second one of the same input, after which a parent is not watched any more."""

_MISSES = 2
"""Shared jobs in a row, not all of whose outputs were taken, after which these layers are computed
apart: the work would be done twice."""

# Without letting go of the GIL, which costs more than to compare
_compare = ctypes.PyDLL(None).memcmp
_compare.argtypes, _compare.restype = (
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t),
    ctypes.c_int,
)


class _Plan:
    """Layers that are computed together, the first of them first.

    Attributes:
        first: of them. layer: computes them all. rows: outputs of each. width: of all.
        matrices: those that the layers had when it was made.
        misses: jobs in a row whose outputs were not all taken. Threads that count at once may
            count one too few.
    """

    def __init__(self, members: Sequence[HeldMatrix]) -> None:
        self.members = tuple(members)
        self.first = self.members[0]
        self.matrices = tuple(held.matrix for held in self.members)
        first, *others = (held.where for held in self.members)
        name = "·".join([first, *(where.rpartition(".")[2] for where in others)])
        self.layer = DenseLayer(self.matrices, name=name)
        self.rows = list(self.layer.rows)
        self.width = sum(self.rows)
        self.misses = 0


class _Staged(threading.local):
    """A thread's latest input, and what is left of the outputs of its shared job.

    Attributes:
        input: its bytes.
        seen: while a parent is watched, the layers that had this input.
        plan: whose job it was; None for no job.
        inference: whether the outputs were made in inference mode.
        outputs: of matrices whose layers have not taken theirs.
    """

    input: bytes = b""
    seen: tuple[HeldMatrix, ...] = ()
    plan: _Plan | None = None
    inference = False
    outputs: dict[PackedMatrix, torch.Tensor]

    def __init__(self) -> None:
        self.outputs = {}


class SharedInput:
    """What linear layers of one parent, of equal inputs, format and pool, know of each other."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._given_up: set[tuple[HeldMatrix, ...]] = set()
        self._looks = _LOOKS
        self._staged = _Staged()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        """The copy of a model learns for itself."""
        return SharedInput()

    def output(self, held: HeldMatrix, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `held`'s layer for a plain input of 1 to `MOST_ELEMENTS` elements, or None:
        compute it alone."""
        plan = self._plan
        if plan is None:
            if not self._looks:
                return None
            self._watch(held, x)
            plan = self._plan
        elif held is not plan.first:
            return self._part(plan, held, x)
        return self._job(plan, x) if plan is not None and held is plan.first else None

    def _job(self, plan: _Plan, x: torch.Tensor) -> torch.Tensor | None:
        """Compute all outputs; that of the first layer."""
        staged = self._staged
        if staged.plan is plan:
            plan.misses = plan.misses + 1 if staged.outputs else 0
            if plan.misses >= _MISSES:
                staged.plan, staged.outputs = None, {}
                self._given_up.add(plan.members)
                self._plan = None
                return None
        staged.plan, staged.outputs = None, {}
        for held, matrix in zip(plan.members, plan.matrices, strict=True):
            if held.matrix is not matrix:  # load_state_dict has put another in its place
                plan = self._plan = _Plan(plan.members)
                break
        elements, address, rows = x.numel(), x.data_ptr(), plan.rows
        *lead, inputs = x.shape
        tokens = elements // inputs
        out = x.new_empty((*lead, plan.width) if tokens == 1 else (tokens * plan.width,))
        job = plan.layer.start(tokens, address, out.data_ptr(), out, x)
        # While other workers are at it already
        seen = ctypes.string_at(address, 2 * elements)
        if tokens == 1:
            parts = torch.unsafe_split_with_sizes(out, rows, -1)
        else:
            flat = torch.unsafe_split_with_sizes(out, [tokens * n for n in rows])
            parts = tuple(y.view(*lead, n) for y, n in zip(flat, rows, strict=True))
        outputs = dict(zip(plan.matrices, parts, strict=True))
        first = outputs.pop(plan.matrices[0])
        inference = torch.is_inference_mode_enabled()
        job.wait()
        staged.input, staged.plan, staged.outputs = seen, plan, outputs
        staged.inference = inference
        return first

    def _part(self, plan: _Plan, held: HeldMatrix, x: torch.Tensor) -> torch.Tensor | None:
        """The output that this thread's latest job has for `held`, if this was its input."""
        staged = self._staged
        if staged.plan is not plan or not staged.outputs:
            return None
        if (
            not self._is_staged(x)
            or staged.inference is not torch.is_inference_mode_enabled()
            or (part := staged.outputs.pop(held.matrix, None)) is None
        ):
            return None
        shape = x.shape
        return part if part.shape[:-1] == shape[:-1] else part.view(*shape[:-1], part.shape[-1])

    def _is_staged(self, x: torch.Tensor) -> bool:
        seen, nbytes = self._staged.input, 2 * x.numel()
        return len(seen) == nbytes and not _compare(x.data_ptr(), seen, nbytes)

    def _watch(self, held: HeldMatrix, x: torch.Tensor) -> None:
        """Learn who has the same input: those between two different ones."""
        staged = self._staged
        if staged.seen and held not in staged.seen and self._is_staged(x):
            staged.seen += (held,)
            return
        together, staged.seen = staged.seen, (held,)
        staged.input = ctypes.string_at(x.data_ptr(), 2 * x.numel())
        if len(together) > 1 and together not in self._given_up:
            self._plan, staged.seen = _Plan(together), ()
        else:
            self._looks -= 1
