"""The experts of one layer in memory: packed on load, unpacked again for export."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers.records import Expert
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows, publish_address
from hybrid_moe.cpu_kernels.strips.unpack import RunAll, unpack_gate_up, unpack_rows
from hybrid_moe.formats.shares import ShareLayout, even_shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.table import Array, WeightFormat
from hybrid_moe.formats.tensors import ExpertTensors, check_matrix


class PackedExperts:
    """Packed weights of a layer's experts, each cut over the pools: allocate, load each expert,
    close. Loading is thread-safe for different experts."""

    def __init__(
        self, fmt: WeightFormat, num_experts: int, hidden: int, intermediate: int, pool: PoolConfig
    ) -> None:
        """Describe them; nothing is allocated.

        Args:
            fmt: how the weights are stored, and held.
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
        self.fmt = fmt
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.pool = pool
        self.gate_up_layout = strip_layout(fmt, hidden)
        self.down_layout = strip_layout(fmt, intermediate)
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
        self._arenas: list[Arena] = []
        rows = round_up(max(hidden, intermediate), STRIP_ROWS)
        self._no_bias: npt.NDArray[np.float32] = np.zeros(rows, np.float32)
        """The biases of every matrix that has none."""
        self._closed = False
        self._pid = os.getpid()

    def _new_table(self) -> Array:
        """`records.Expert` [E, pools] of experts that are not loaded."""
        return np.zeros((self.num_experts, self.pool.pools), Expert.dtype)

    def expert_nbytes(self, pool: int) -> int:
        """Packed bytes of one expert in one pool, with the room for biases that `allocate` made."""
        return self._layouts[pool].nbytes

    @property
    def nbytes(self) -> int:
        """Packed bytes held."""
        return sum(arena.nbytes for arena in self._arenas)

    def allocate(self, resident: npt.NDArray[np.bool_], *, biases: bool = True) -> None:
        """Map memory for experts. May be called once.

        Args:
            resident: bool [E], the experts that are to be loaded.
            biases: with room for biases; False where none of them has any.

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
        self._layouts = [replace(layout, biases=biases) for layout in self._layouts]
        self._arenas = [  # all or none
            Arena(len(chosen) * layout.nbytes, nodes)
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
        arenas, table = self._arenas, self._table  # `close` makes new ones
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or self._place[expert] < 0:
            raise IndexError(f"expert {expert} has no memory in this layer")
        H, I = self.hidden, self.intermediate
        check_matrix(tensors.gate, self.fmt, I, H)
        check_matrix(tensors.up, self.fmt, I, H)
        check_matrix(tensors.down, self.fmt, H, I)
        shares = table[expert]
        has_bias = self._biased_matrices(expert, shares[0], tensors)
        ranges = self._ranges(expert, arenas)
        for pool, (layout, (address, memory)) in enumerate(zip(self._layouts, ranges, strict=True)):
            biases = self._load_biases(layout, address, memory, tensors, has_bias)
            pack_gate_up(address, layout.blocks, layout.gate_up, tensors.gate, tensors.up, I)
            down = address + layout.down_offset
            pack_rows(down, layout.strips, layout.down, tensors.down, H)
            shares[pool] = (shares["gate_up"][pool] if pool == 0 else address, down, *biases)
        publish_address(shares["gate_up"], ranges[0][0])
        self._check_open()

    def _ranges(self, expert: int, arenas: list[Arena]) -> list[tuple[int, npt.NDArray[np.uint8]]]:
        """Of each pool, where its share of an expert is: the address, and uint8 [nbytes]."""
        ranges = []
        for layout, arena in zip(self._layouts, arenas, strict=True):
            at = int(self._place[expert]) * layout.nbytes
            ranges.append((arena.address + at, arena.bytes[at : at + layout.nbytes]))
        return ranges

    def _biased_matrices(self, expert: int, share: Any, tensors: ExpertTensors) -> set[str]:
        """Which of gate, up and down have biases now, or had some: an expert that is loaded once
        more keeps their places, since a pass may be reading them."""
        names = set()
        for name in self._layouts[0].bias_rows:
            given = getattr(tensors, name).bias is not None
            if given and not self._layouts[0].biases:
                raise ValueError(
                    f"expert {expert}: {name} has a bias, but this layer was allocated without "
                    "room for biases; use allocate(resident, biases=True)"
                )
            if given or self._has_bias(share, name):
                names.add(name)
        return names

    def _load_biases(
        self,
        layout: ShareLayout,
        address: int,
        memory: npt.NDArray[np.uint8],
        tensors: ExpertTensors,
        has_bias: set[str],
    ) -> list[int]:
        """Copy the biases into a pool's range; what its record says of gate's, up's and down's."""
        addresses = []
        for name, rows in layout.bias_rows.items():
            if name not in has_bias:
                addresses.append(self._no_bias.ctypes.data)
                continue
            bias, here = getattr(tensors, name).bias, layout.bias(memory, name)
            if bias is None:
                here[:] = 0
            else:
                part = bias[rows.start : rows.stop]
                here[: len(part)] = part
            # drivers add 4 bytes for each row of the matrix, and those before `rows` are not here
            addresses.append(address + layout.bias_offsets[name] - 4 * rows.start)
        return addresses

    def _has_bias(self, share: Any, name: str) -> bool:
        """Whether an expert has been loaded with one.

        Args:
            share: that of pool 0, whose rows begin at 0: the address is that of its own memory.
        """
        return share[f"{name}_bias"] not in (0, self._no_bias.ctypes.data)

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
        shares = [memory for _, memory in self._ranges(expert, self._arenas)]
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
        fmt = self.fmt
        gate, up = unpack_gate_up(gate_up, self.gate_up_layout, fmt, self.intermediate, run_all)
        matrices = {"gate": gate, "up": up}
        matrices["down"] = unpack_rows(down, self.down_layout, fmt, self.hidden, run_all)
        for name, matrix in matrices.items():
            if self._has_bias(self._table[expert, 0], name):
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
        return published

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
