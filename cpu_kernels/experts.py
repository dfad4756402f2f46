"""The experts of one layer in memory: packed on load, unpacked again for export.

An expert has a place in the arenas: one range of bytes for each pool. Experts may leave and come
back (`vacate`, `occupy`): whoever moves one copies its ranges, and nothing is packed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers.records import Expert
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.placement_change import COLD, PlacementChange
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows, publish_address
from hybrid_moe.cpu_kernels.strips.unpack import RunAll, unpack_gate_up, unpack_rows
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.shares import ShareLayout, even_shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.tensors import ExpertTensors, check_matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats

BIASED = ("gate", "up", "down")

Ranges = list[npt.NDArray[np.uint8]]
"""Of each pool, the bytes of its share of an expert."""


class PackedExperts:
    """Packed weights of a layer's experts, each cut over the pools: allocate, load each expert,
    close. Loading is thread-safe for different experts."""

    def __init__(
        self,
        fmt: WeightFormat | LayerFormats,
        num_experts: int,
        hidden: int,
        intermediate: int,
        pool: PoolConfig,
    ) -> None:
        """Describe them; nothing is allocated.

        Args:
            fmt: how the weights are stored, and held; one for all projections, or two.
            num_experts: E. hidden: H. intermediate: I; both multiples of 32.
            pool: each of its pools holds a share of the output rows of every expert.

        Raises:
            ValueError: a size is not positive or not a multiple of 32.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        for name, size in (("hidden", hidden), ("intermediate", intermediate)):
            if size < 1 or size % GROUP:
                raise ValueError(f"{name} = {size} must be a positive multiple of {GROUP}")
        self.formats = layer_formats(fmt)
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.pool = pool
        self.gate_up_layout = strip_layout(self.formats.gate_up, hidden)
        self.down_layout = strip_layout(self.formats.down, intermediate)
        parts = pool.threads_per_pool
        self._blocks = even_shares(intermediate // GROUP, parts)
        self._strips = even_shares(-(-hidden // STRIP_ROWS), parts)
        self._layouts = [
            ShareLayout(
                range(*self._blocks[pool : pool + 2].tolist()),
                range(*self._strips[pool : pool + 2].tolist()),
                self.gate_up_layout,
                self.down_layout,
            )
            for pool in range(len(parts))
        ]
        self._table = self._new_table()
        self._place: npt.NDArray[np.int64] = np.full(num_experts, -1, np.int64)
        """Of each expert in the arenas; -1: none."""
        self._free_places: list[int] = []
        self._biased: npt.NDArray[np.bool_] = np.zeros((num_experts, 3), np.bool_)
        """Which of gate, up and down an expert has been loaded with a bias of."""
        self._arenas: list[Arena] = []
        rows = round_up(max(hidden, intermediate), STRIP_ROWS)
        self._no_bias: npt.NDArray[np.float32] = np.zeros(rows, np.float32)
        """The biases of every matrix that has none."""
        self._has_loaded = False
        self._closed = False
        self._pid = os.getpid()

    @property
    def fmt(self) -> WeightFormat:
        """The format of gate and up, and where one is all that a caller knows of, of down too."""
        return self.formats.gate_up

    def _new_table(self) -> Array:
        """`records.Expert` [E, pools] of experts that are not loaded."""
        return np.zeros((self.num_experts, self.pool.pools), Expert.dtype)

    def expert_nbytes(self, pool: int) -> int:
        """Packed bytes of one expert in one pool, with the room for biases that `allocate` made."""
        return self._layouts[pool].nbytes

    def shares(self, *, biases: bool) -> tuple[ShareLayout, ...]:
        """An expert's range in each pool, with or without room for biases."""
        return tuple(replace(layout, biases=biases) for layout in self._layouts)

    @property
    def nbytes(self) -> int:
        """Packed bytes held."""
        return sum(arena.nbytes for arena in self._arenas)

    def allocate(
        self, resident: npt.NDArray[np.bool_], *, biases: bool = True, spare: int = 0
    ) -> None:
        """Map memory for experts. May be called once.

        Args:
            resident: bool [E], the experts that are to be loaded.
            biases: with room for biases; False where none of them has any.
            spare: places beside theirs, for experts that come later.

        Raises:
            ValueError: wrong length. RuntimeError: called twice or closed.
            MemoryError: the system refuses.
        """
        if resident.shape != (self.num_experts,):
            raise ValueError(f"resident has shape {resident.shape}, expected ({self.num_experts},)")
        self._check_open()
        if self._arenas:
            raise RuntimeError("already allocated")
        self._pid = os.getpid()
        chosen = np.flatnonzero(resident)
        self._place[chosen] = np.arange(len(chosen))
        places = len(chosen) + spare
        self._free_places = list(range(len(chosen), places))
        self._layouts = list(self.shares(biases=biases))
        self._arenas = [  # all or none
            Arena(places * layout.nbytes, nodes)
            for layout, nodes in zip(self._layouts, self.pool.memory_nodes, strict=True)
        ]

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Check and pack one expert; the arrays may be reused afterwards.

        A pass of another thread finds the expert whole, or not loaded.

        Raises:
            CheckpointError: a matrix is not what the layer expects.
            IndexError: no such expert, or `allocate` did not name it.
            ValueError: a matrix has a bias, and `allocate` made no room for biases.
            RuntimeError: the layer is closed, or this is a forked child.
        """
        self._load(
            expert,
            lambda: self._check_tensors(expert, tensors),
            lambda pool, memory: self._pack_share(self._layouts[pool], memory, tensors),
        )

    def load_packed(
        self,
        expert: int,
        read: Callable[[int, npt.NDArray[np.uint8]], None],
        biased: Sequence[bool],
    ) -> None:
        """Load an expert that `pack` has packed before, for a layer of the same `shares`.

        Args:
            read: `read(pool, memory)` fills uint8 [nbytes], the expert's range of a pool. Where it
                raises, the expert is not loaded.
            biased: whether its gate, up and down have biases.

        Raises:
            IndexError, ValueError, RuntimeError: see `load`.
        """
        self._load(expert, lambda: self._note_biases(expert, biased), read)

    def _load(
        self,
        expert: int,
        check: Callable[[], None],
        fill: Callable[[int, npt.NDArray[np.uint8]], None],
    ) -> None:
        """Fill the expert's ranges, and publish them when that is done."""
        arenas, table, layouts = self._arenas, self._table, self._layouts  # `close` makes new ones
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or self._place[expert] < 0:
            raise IndexError(f"expert {expert} has no memory in this layer")
        check()
        shares, ranges = table[expert], self._ranges(int(self._place[expert]), arenas)
        entries = self._entries(expert, ranges)
        for pool in range(len(layouts)):
            fill(pool, ranges[pool])
            if pool == 0:
                entries["gate_up"][0] = shares["gate_up"][0]
            shares[pool] = entries[pool]
        publish_address(shares["gate_up"], ranges[0].ctypes.data)
        self._has_loaded = True
        self._check_open()

    def pack(self, expert: int, tensors: ExpertTensors, ranges: Ranges) -> None:
        """Check and pack one expert into memory of the caller's, as `load` would into its place.

        Args:
            ranges: of each pool, uint8 [nbytes] of its share (`shares`).

        Raises:
            CheckpointError, ValueError: see `load`.
        """
        self._check_tensors(expert, tensors)
        for layout, memory in zip(self._layouts, ranges, strict=True):
            self._pack_share(layout, memory, tensors)

    def _check_tensors(self, expert: int, tensors: ExpertTensors) -> None:
        """Raise unless they are an expert of this layer; note which of them have biases. An expert
        that is loaded once more keeps those that it had, since a pass may be reading them."""
        H, I = self.hidden, self.intermediate
        gate_up, down = self.formats
        check_matrix(tensors.gate, gate_up, I, H)
        check_matrix(tensors.up, gate_up, I, H)
        check_matrix(tensors.down, down, H, I)
        self._note_biases(expert, [getattr(tensors, name).bias is not None for name in BIASED])

    def _note_biases(self, expert: int, biased: Sequence[bool]) -> None:
        for name, has_bias in zip(BIASED, biased, strict=True):
            if has_bias and not self._layouts[0].biases:
                raise ValueError(
                    f"expert {expert}: {name} has a bias, but this layer was allocated without "
                    "room for biases; use allocate(resident, biases=True)"
                )
        self._biased[expert] |= np.asarray(biased, np.bool_)

    def _pack_share(
        self, layout: ShareLayout, memory: npt.NDArray[np.uint8], tensors: ExpertTensors
    ) -> None:
        """Fill a pool's range; biases that a matrix does not have are zeros."""
        for name, rows in layout.bias_rows.items() if layout.biases else ():
            bias, here = getattr(tensors, name).bias, layout.bias(memory, name)
            part = () if bias is None else bias[rows.start : rows.stop]
            here[: len(part)] = part
            here[len(part) :] = 0
        address = memory.ctypes.data
        gate, up = tensors.gate, tensors.up
        pack_gate_up(address, layout.blocks, layout.gate_up, gate, up, self.intermediate)
        down = address + layout.down_offset
        pack_rows(down, layout.strips, layout.down, tensors.down, self.hidden)

    def _ranges(self, place: int, arenas: list[Arena]) -> Ranges:
        """Of each pool, the bytes of a place: uint8 [nbytes]."""
        return [
            arena.bytes[place * layout.nbytes : (place + 1) * layout.nbytes]
            for layout, arena in zip(self._layouts, arenas, strict=True)
        ]

    def _entries(self, expert: int, ranges: Ranges) -> Array:
        """`records.Expert` [pools] of an expert whose ranges these are."""
        entries = np.zeros(len(ranges), Expert.dtype)
        for pool, (layout, memory) in enumerate(zip(self._layouts, ranges, strict=True)):
            address = memory.ctypes.data
            # drivers add 4 bytes for each row of the matrix, and those before `rows` are not here
            biases = [
                address + layout.bias_offsets[name] - 4 * rows.start
                if self._biased[expert, at]
                else self._no_bias.ctypes.data
                for at, (name, rows) in enumerate(layout.bias_rows.items())
            ]
            entries[pool] = (address, address + layout.down_offset, *biases)
        return entries

    # Moving -------------------------------------------------------------------------------------

    @property
    def arenas(self) -> Sequence[Arena]:
        """The pools' memory."""
        return tuple(self._arenas)

    @property
    def free_places(self) -> int:
        """Places in which no expert is, or is to come."""
        return len(self._free_places)

    def has_place(self, expert: int) -> bool:
        """Whether the expert has a place, or is about to be copied into one."""
        return bool(self._place[expert] >= 0)

    def ranges_of(self, expert: int) -> Ranges:
        """Of each pool, the bytes of an expert that has a place: uint8 [nbytes], in the arenas."""
        self._check_process()
        if not self.has_place(expert):
            raise IndexError(f"expert {expert} has no memory in this layer")
        return self._ranges(int(self._place[expert]), self._arenas)

    def occupy(self, expert: int, live: int) -> PlacementChange:
        """Give an expert a free place (`ranges_of`), into which the caller copies it.

        Args:
            live: address of the expert's byte in the layer's live mask.

        Returns:
            To be applied when the copy is there: jobs launched afterwards compute the expert.

        Raises:
            RuntimeError: no place is free.
        """
        self._check_open()
        self._check_process()
        if not self._free_places:
            raise RuntimeError("no place of this layer is free")
        self._place[expert] = self._free_places.pop()
        entries = self._entries(expert, self.ranges_of(expert))
        return PlacementChange(self._table, expert, entries, live, COLD, self._owned)

    def vacate(self, expert: int, live: int, state: int) -> PlacementChange:
        """Take an expert's place for other experts.

        Args:
            live: as for `occupy`.
            state: what the mask says of the expert from then on.

        Returns:
            To be applied when no job that was launched before can read the place any more, and
            before anything is copied into it.
        """
        self._check_open()
        # the entries stay: a job that should not read them finds other weights, but finds memory
        entries = self._entries(expert, self.ranges_of(expert))
        self._free_places.append(int(self._place[expert]))
        self._place[expert] = -1
        return PlacementChange(self._table, expert, entries, live, state, self._owned)

    def restate(self, expert: int, live: int, state: int) -> PlacementChange:
        """Let the mask say something else of an expert that keeps its place; arguments and result
        as for `vacate`."""
        self._check_open()
        entries = self._entries(expert, self.ranges_of(expert))
        return PlacementChange(self._table, expert, entries, live, state, self._owned)

    @property
    def _owned(self) -> tuple[object, ...]:
        """What must not be freed while anything is to be copied or changed."""
        return self._arenas, self._table, self._no_bias

    def check_readable(self, expert: int) -> None:
        """Raise unless `unpack(expert)` can succeed: see there."""
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or not self.loaded[expert]:
            raise IndexError(f"expert {expert} is not loaded in this layer")

    def unpack(self, expert: int, run_all: RunAll = map) -> ExpertTensors:
        """A copy of a loaded expert, bit for bit as `load` was given it. Thread-safe.

        Args:
            expert: id.
            run_all: runs the copies; an executor's `map` runs them on its threads.

        Raises:
            IndexError: it is not loaded. RuntimeError: closed, or this is a forked child.
        """
        self.check_readable(expert)
        return self.unpack_ranges(expert, self.ranges_of(expert), run_all)

    def unpack_ranges(self, expert: int, shares: Ranges, run_all: RunAll = map) -> ExpertTensors:
        """The same of an expert that `pack` has packed, from wherever its ranges are now."""
        strips = [
            (share[: layout.down_offset], share[layout.down_offset : layout.strip_bytes])
            for layout, share in zip(self._layouts, shares, strict=True)
        ]
        gate_up, down = (
            (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, layout.nbytes)
            for parts, layout in zip(
                zip(*strips, strict=True), (self.gate_up_layout, self.down_layout), strict=True
            )
        )
        first, second = self.formats
        gate, up = unpack_gate_up(gate_up, self.gate_up_layout, first, self.intermediate, run_all)
        matrices = {"gate": gate, "up": up}
        matrices["down"] = unpack_rows(down, self.down_layout, second, self.hidden, run_all)
        for at, (name, matrix) in enumerate(matrices.items()):
            if self._biased[expert, at]:
                parts = [
                    layout.bias(share, name)
                    for layout, share in zip(self._layouts, shares, strict=True)
                ]
                matrices[name] = replace(matrix, bias=np.concatenate(parts)[: len(matrix.codes)])
        return ExpertTensors(**matrices)

    @property
    def loaded(self) -> npt.NDArray[np.bool_]:
        """Which experts are packed (bool [E], a copy)."""
        published: npt.NDArray[np.bool_] = self._table["gate_up"][:, 0] != 0
        return published & (self._place >= 0)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "packed experts are not inherited by a forked child process; "
                "load the model after the fork, or use the 'spawn' start method"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this layer is closed")

    def close(self) -> None:
        """Let go of the packed weights: they are freed when no job under way owns them. Nothing can
        be loaded or unpacked afterwards."""
        self._closed = True
        # new objects: jobs under way own the old ones
        self._arenas, self._table = [], self._new_table()
