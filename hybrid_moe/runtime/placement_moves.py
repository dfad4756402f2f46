"""Which experts of a layer are in slots and which in panels, and moves between the two.

    panels (arenas, one range a pool)  ──promote──►  slot (the same ranges, one after another)
                                       ◄──demote───

Both sides hold the same bytes, so a move is a copy of whole ranges; where the CPU keeps the panels
of hot experts too, a demotion copies nothing. Every submission works on the
placement as it was: a move comes behind the layer's jobs under way (on CPU tensors the caller waits
for them, on CUDA tensors the stream does), and what tells the halves which experts are theirs
changes behind the copy: `slot_of` on the device, and the live mask and table of the CPU's jobs.

The caller's `gpu_experts_mask` says where an expert is by the order of calls. It is changed here
and nowhere else: a mask that says otherwise is an error at the next submission.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.placement_change import AWAY, COLD, HOT, PlacementChange
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts, has_wide_scales
from hybrid_moe.logs import warn_once
from hybrid_moe.runtime.gpu_faults import explained
from hybrid_moe.runtime.hot_half import HotHalf, entered
from hybrid_moe.streams.interface import Stream
from hybrid_moe.streams.page_lock import LOCKS, page_lock

logger = logging.getLogger(__name__)


class ExpertPlacement:
    """Of one layer. It takes the experts when they are loaded, and moves them afterwards.

    Args:
        layer: the CPU's half, without memory yet.
        hot: the other half.
        mask: bool [E] CPU tensor of the caller's: the experts that are to be hot.
        layer_idx: for messages.

    Attributes:
        live: uint8 [E] CPU tensor at a fixed address: what the CPU's jobs go by.
        moved_bytes: copied by all moves so far.

    Raises:
        ValueError: the mask puts more experts on the GPU than it has slots, or one that is
            elsewhere: it was changed since the wrapper was made.
    """

    def __init__(
        self, layer: ExpertLayer, hot: HotHalf, mask: torch.Tensor, layer_idx: int
    ) -> None:
        self._layer, self._hot, self._layer_idx = layer, hot, layer_idx
        self._mask: npt.NDArray[np.bool_] = mask.numpy()  # shares its memory
        self._keeps = hot.options.keep_panels
        is_hot, away = self._mask.copy(), hot.options.elsewhere.numpy()
        _check_placement(is_hot, away, hot.options.slots, layer_idx)
        self._expected: npt.NDArray[np.bool_] = is_hot
        self._expected_bytes = is_hot.tobytes()
        self._away = away
        self._slot: npt.NDArray[np.int32] = np.full(len(is_hot), -1, np.int32)
        self._slot[is_hot] = np.arange(is_hot.sum(), dtype=np.int32)
        self._free_slots = list(range(int(is_hot.sum()), hot.options.slots))
        self._wide: npt.NDArray[np.int32] = np.zeros(len(is_hot), np.int32)
        self.live = torch.from_numpy(np.where(is_hot, HOT, np.where(away, AWAY, COLD)))
        self.live = self.live.to(torch.uint8)
        if torch.cuda.is_available():
            self.live = self.live.pin_memory()
        self._staging: list[torch.Tensor] = []
        self._latest: PlacementChange | None = None
        self._moving = -1
        """An expert that is in one half already and in the other one still; else -1."""
        self._staged = False
        """Whether copies go through the driver's pinned buffers."""
        self.moved_bytes = 0

    # Loading ------------------------------------------------------------------------------------

    @property
    def pool(self) -> PoolConfig:
        """Threads that load."""
        return self._layer.pool

    @property
    def cold(self) -> npt.NDArray[np.bool_]:
        """bool [E], the experts that the CPU computes by the order of calls."""
        cold: npt.NDArray[np.bool_] = ~self._expected & ~self._away
        return cold

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """bool [E], the experts that the CPU has in its memory. Where it has none it has no place
        for any: then none comes later."""
        return ~self._away if self._keeps else self.cold

    @property
    def hot(self) -> npt.NDArray[np.bool_]:
        """bool [E], the experts in slots by the order of calls; not to be changed."""
        return self._expected

    @property
    def wide(self) -> npt.NDArray[np.int32]:
        """int32 [E], not 0 for experts that have `has_wide_scales`."""
        return self._wide

    def allocate(self, wanted: npt.NDArray[np.bool_], *, biases: bool) -> None:
        """Memory for the experts of bool [E], which are all that are not elsewhere."""
        reserved = self._hot.biases
        if biases and reserved is False:
            raise ValueError(
                f"layer {self._layer_idx}: the experts have biases, but the slots were reserved "
                "without room for them: reserve_slots(biases=True)"
            )
        room = biases if reserved is None else reserved
        cold = wanted if self._keeps else wanted & ~self._expected
        # one place more: a full set of slots can swap an expert, first down, then up
        spare = int(self._hot.options.slots > 0 and cold.any() and not self._keeps)
        self._hot.reserve(self._layer.shares(biases=room))
        self._layer.allocate(cold, biases=room, spare=spare)

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Pack an expert to where it belongs. Thread-safe for different experts."""
        self._wide[expert] = has_wide_scales(self._layer.formats, tensors)
        slots, slot = self._hot.experts, int(self._slot[expert])
        if slot < 0 or slots is None or self._keeps:
            self._layer.load(expert, tensors)
        if slot < 0 or slots is None:
            return
        if slots.memory.device.type == "cpu":
            self._pack(expert, tensors, slots, slots.memory[slot])
        else:
            try:
                staging = self._staging.pop()
            except IndexError:  # as many as there are threads
                staging = _new_staging(slots.layout.nbytes)
            self._pack(expert, tensors, slots, staging)
            with explained(self._layer_idx, self._hot.device):
                slots.memory[slot].copy_(staging)  # and waits for it
            self._staging.append(staging)

    def _pack(
        self, expert: int, tensors: ExpertTensors, slots: SlotExperts, whole: torch.Tensor
    ) -> None:
        self._layer.pack(expert, tensors, [part.numpy() for part in slots.ranges(whole)])

    def ready(self) -> None:
        """All experts are loaded: tell the device where."""
        self._staging.clear()
        slots = self._hot.experts
        if slots is None:
            return
        hot = self._slot >= 0
        wide = np.zeros(slots.slots, np.int32)
        wide[self._slot[hot]] = self._wide[hot]
        with explained(self._layer_idx, self._hot.device):
            slots.slot_of.copy_(torch.from_numpy(self._slot))
            slots.wide.copy_(torch.from_numpy(wide))
            if self._hot.device.type == "cuda":
                torch.cuda.synchronize(self._hot.device)
                slots.prepare(self._hot.experts_per_token)
                locked = [page_lock(arena) for arena in self._layer.arenas]
                self._staged = not all(locked)
                logger.info("layer %d: %s", self._layer_idx, LOCKS)

    def unpack(self, expert: int) -> ExpertTensors:
        """A copy of an expert, hot or cold, bit for bit as it was loaded.

        Raises:
            IndexError: neither half holds it.
        """
        self.wait()
        slots, slot = self._hot.experts, int(self._slot[expert])
        if slots is None or slot < 0:
            return self._layer.unpack(expert)
        ranges = [part.numpy() for part in slots.ranges(slots.memory[slot].cpu())]
        return self._layer.unpack_ranges(expert, ranges)

    # Moving -------------------------------------------------------------------------------------

    def check_mask(self) -> None:
        """Raise `RuntimeError`, naming an expert, if the caller's mask is not the placement."""
        self._check_whole()
        if self._mask.tobytes() == self._expected_bytes:
            return
        expert = int(np.flatnonzero(self._mask != self._expected)[0])
        value = bool(self._mask[expert])
        where = "has no slot on the GPU" if value else "has no panels on the CPU"
        move = "promote" if value else "demote"
        if self._away[expert]:
            where, move = "is computed elsewhere", "promote"
        raise RuntimeError(
            f"layer {self._layer_idx}: gpu_experts_mask[{expert}] was set to {value}, but expert "
            f"{expert} {where}: with a gpu_backend, {move}({expert}) moves the weights and changes "
            "the mask; set it back"
        )

    def promote(
        self, expert: int, stream: Stream | None, settle: Callable[[Stream | None], None]
    ) -> None:
        """Copy an expert from its panels into a free slot.

        Args:
            stream: in whose order; None on CPU tensors.
            settle: lets what follows wait for the layer's jobs under way.

        Raises:
            ValueError: it is on the GPU already, or elsewhere. RuntimeError: no slot is free.
        """
        self._check_whole()
        if self._slot[expert] >= 0 or not self._layer.has_place(expert):
            raise ValueError(self._not_there(expert, "promote", "on the CPU"))
        slots = self._hot.experts
        if slots is None or not self._free_slots:
            raise RuntimeError(
                f"layer {self._layer_idx}: all {self._hot.options.slots} slots are taken: demote "
                f"an expert before promote({expert}), or ask for more gpu_slots"
            )
        self.check_stream(stream)
        settle(stream)
        slot = self._free_slots[-1]
        with entered(stream):
            self._copy(slots, slot, expert, to_slot=True)
            slots.wide[slot : slot + 1].fill_(int(self._wide[expert]))
            slots.slot_of[expert : expert + 1].fill_(slot)
        self._moving = expert
        self._slot[expert] = self._free_slots.pop()
        leave = self._layer.restate if self._keeps else self._layer.vacate
        self._apply(leave(expert, self._live_byte(expert), HOT), stream)
        self._set_mask(expert, True)
        self._moving = -1

    def demote(
        self, expert: int, stream: Stream | None, settle: Callable[[Stream | None], None]
    ) -> None:
        """Copy an expert from its slot into a free place among the panels; arguments as for
        `promote`.

        Raises:
            ValueError: it is not on the GPU. RuntimeError: the CPU has no free place.
        """
        self._check_whole()
        slots, slot = self._hot.experts, int(self._slot[expert])
        if slots is None or slot < 0:
            raise ValueError(self._not_there(expert, "demote", "on the GPU"))
        if not self._layer.free_places and not self._keeps:
            raise RuntimeError(
                f"layer {self._layer_idx}: no place on the CPU is free for expert {expert}: "
                "promote another one first (a layer has one place to spare, and none if it was "
                "loaded with all of its experts on the GPU)"
            )
        self.check_stream(stream)
        settle(stream)
        if self._keeps:
            change = self._layer.restate(expert, self._live_byte(expert), COLD)
            with entered(stream):
                slots.slot_of[expert : expert + 1].fill_(-1)
        else:
            change = self._bring_back(slots, slot, expert, stream)
        self._moving = expert
        self._slot[expert] = -1
        self._free_slots.append(slot)
        self._apply(change, stream)
        self._set_mask(expert, False)
        self._moving = -1

    def _bring_back(
        self, slots: SlotExperts, slot: int, expert: int, stream: Stream | None
    ) -> PlacementChange:
        """Copy an expert from its slot into a free place."""
        change = self._layer.occupy(expert, self._live_byte(expert))
        try:
            with entered(stream):
                self._copy(slots, slot, expert, to_slot=False)
                slots.slot_of[expert : expert + 1].fill_(-1)
        except BaseException:  # it stays where it is
            self._layer.vacate(expert, self._live_byte(expert), HOT)
            raise
        return change

    def wait(self) -> None:
        """Return when every move so far is over, copies and all."""
        if self._latest is not None and not self._latest.idle:
            with explained(self._layer_idx, self._hot.device):
                torch.cuda.synchronize(self._hot.device)

    def _not_there(self, expert: int, move: str, place: str) -> str:
        if self._away[expert]:
            return f"layer {self._layer_idx}: {move}({expert}): expert {expert} is elsewhere"
        return f"layer {self._layer_idx}: {move}({expert}): expert {expert} is not {place}"

    def _check_whole(self) -> None:
        if self._moving >= 0:
            raise RuntimeError(
                f"layer {self._layer_idx}: the move of expert {self._moving} failed half-way, and "
                "the halves do not agree where it is: make a new wrapper"
            )

    def check_stream(self, stream: Stream | None) -> None:
        """Raise `RuntimeError` while a graph is captured from a stream."""
        if stream is not None and stream.capturing():
            raise RuntimeError(
                f"layer {self._layer_idx}: experts cannot be moved while a CUDA graph is captured: "
                "move them between replays"
            )

    def _copy(self, slots: SlotExperts, slot: int, expert: int, *, to_slot: bool) -> None:
        with explained(self._layer_idx, self._hot.device):
            device = slots.ranges(slots.memory[slot])
            for there, range_ in zip(device, self._layer.ranges_of(expert), strict=True):
                if not range_.size:
                    continue
                here = torch.from_numpy(range_)
                if to_slot:
                    there.copy_(here, non_blocking=True)
                else:
                    here.copy_(there, non_blocking=True)
                self.moved_bytes += range_.nbytes
                TOTALS.moved_bytes += range_.nbytes
                if self._staged:
                    LOCKS.staged += range_.nbytes

    def _live_byte(self, expert: int) -> int:
        return self.live.data_ptr() + expert

    def _apply(self, change: PlacementChange, stream: Stream | None) -> None:
        if stream is None:
            change.apply()
            return
        keeping.release()
        stream.host_function(change.function, change.user_data)
        self._latest = change
        # the stream calls it even if the layer is dropped before that
        keeping.until_idle(change, (change, self.live, self._hot.experts))

    def _set_mask(self, expert: int, hot: bool) -> None:
        TOTALS.promotions += int(hot)
        TOTALS.demotions += int(not hot)
        self._mask[expert] = hot
        self._expected[expert] = hot
        self._expected_bytes = self._expected.tobytes()


def _check_placement(
    hot: npt.NDArray[np.bool_], away: npt.NDArray[np.bool_], slots: int, layer_idx: int
) -> None:
    if hot.sum() > slots:
        raise ValueError(
            f"layer {layer_idx}: gpu_experts_mask puts {hot.sum()} experts on the GPU, which has "
            f"{slots} slots: ask for more gpu_slots"
        )
    if (both := np.flatnonzero(hot & away)).size:
        raise ValueError(
            f"layer {layer_idx}: gpu_experts_mask is True for expert {both[0]}, which is elsewhere"
        )


def _new_staging(nbytes: int) -> torch.Tensor:
    """Host memory from which a slot is filled, page-locked if the system allows that."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        warn_once(f"slots are filled from memory that is not page-locked: {error}")
        return torch.empty(nbytes, dtype=torch.uint8)
