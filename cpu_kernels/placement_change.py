"""A change of one expert's entries in a layer's table and mask, which compiled code applies.

On CPU tensors it is applied at once. In the order of a GPU's stream it is a host function, behind
the copies that it belongs to: jobs that were posted before see the old entries, later ones the new.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.records import COMPUTED_HERE, ELSEWHERE, ON_GPU, Move
from hybrid_moe.cpu_kernels.jit.record import u8
from hybrid_moe.formats.numbers import Array

COLD, HOT, AWAY = COMPUTED_HERE, ON_GPU, ELSEWHERE
"""What a live mask says of an expert: computed here, on the GPU, or by somebody else."""


@functools.lru_cache(maxsize=1)
def _apply() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["apply_move"])


class PlacementChange:
    """See the module.

    Args:
        table: `records.Expert` [E, pools].
        expert: whose entries change.
        entries: `records.Expert` [pools], what they become.
        live: address of the expert's byte in the live mask.
        state: what that becomes.
        owned: kept until the change has been applied.

    Attributes:
        function: address of `void(void *)` that applies it. user_data: its argument.
    """

    def __init__(
        self, table: Array, expert: int, entries: Array, live: int, state: int, owned: object
    ) -> None:
        self.function = drivers.addresses()["apply_move"]
        self._kept = (table, entries, owned)
        self._move = move = Move.new()
        words = move.words
        words[Move.word("shares")] = table[expert].ctypes.data
        words[Move.word("entries")] = entries.ctypes.data
        move.pools = len(entries)
        move.mask = u8.at(live)
        move.state = state
        self.user_data = move.address

    def apply(self) -> None:
        """Apply it now."""
        _apply()(self.user_data)

    @property
    def idle(self) -> bool:
        """Whether it has been applied; nothing of it is touched afterwards."""
        return bool(self._move.applied.value)
