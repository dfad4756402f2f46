"""Slots in which experts are for one batch of one layer, and then others.

All layers of a model take turns in them. A slot is given out again when the computation that reads
it has been queued: the copy of the next expert waits for that in the order of the streams.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch

from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.runtime.gpu_faults import explained
from hybrid_moe.runtime.hot_half import HotHalf, entered
from hybrid_moe.streams.interface import Event, Stream
from hybrid_moe.streams.link import Link, Transfer

_numbers = itertools.count()


@dataclass(eq=False)
class Wave:
    """Experts of a layer that travel together.

    Attributes:
        slot_of: expert -> its slot, of those that are still what they were when they were sent.
        slots: all that were taken.
        transfer: their copies.
    """

    slot_of: dict[int, int]
    slots: list[int]
    transfer: Transfer
    flow: str = field(default_factory=lambda: f"wave {next(_numbers)}")
    """Names the wave in a trace."""


class TransientSlots:
    """See the module.

    Args:
        half: of a layer, like which all others are that use the slots.
        slots: how many.

    Raises:
        RuntimeError: the device has no room.
    """

    def __init__(self, half: HotHalf, slots: int) -> None:
        self._experts: SlotExperts = half.new_slots(slots)
        self._free: deque[tuple[int, Event | None]] = deque((slot, None) for slot in range(slots))
        self.count = slots
        if half.device.type == "cuda":
            with explained(half.layer_idx, half.device):
                self._experts.prepare(half.experts_per_token)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._experts.nbytes

    @property
    def free(self) -> int:
        """Slots in which nothing is, or is to come."""
        return len(self._free)

    def send(self, link: Link, experts: dict[int, list[torch.Tensor]]) -> Wave:
        """Send experts, each given by its ranges in the arenas, to as many free slots."""
        slot_of: dict[int, int] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        after: list[Event] = []
        for expert, ranges in experts.items():
            slot, read = self._free.popleft()
            slot_of[expert] = slot
            if read is not None and read not in after:
                after.append(read)
            there = self._experts.ranges(self._experts.memory[slot])
            copies += [(to, what) for to, what in zip(there, ranges, strict=True) if what.numel()]
        return Wave(slot_of, list(slot_of.values()), link.send(copies, after))

    def give_back(self, wave: Wave, after: Event | None) -> None:
        """Let other experts take the slots of `wave`, when `after` has been reached."""
        self._free.extend((slot, after) for slot in wave.slots)
        wave.slots = []

    def sums(
        self,
        stream: Stream | None,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        slot_of: torch.Tensor,
        wide: torch.Tensor,
    ) -> torch.Tensor:
        """What the experts of a wave that has arrived give: float32 [T, H], weighted and added up.

        Args:
            stream: in whose order; None: now.
            x: bf16 [T, H]. ids: [T, k]. weights: float32 [T, k]. All contiguous.
            slot_of: int32 [E] in the host's memory, -1 for experts of no slot.
            wide: int32 [slots], see `SlotExperts`.
        """
        experts = self._experts
        with entered(stream):
            if stream is not None:
                slot_of, wide = stream.to_device(slot_of), stream.to_device(wide)
            experts.slot_of, experts.wide = slot_of, wide
            return experts.sums(x, ids, weights)
