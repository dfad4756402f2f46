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
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.table import Array, WeightFormat
from hybrid_moe.formats.tensors import ExpertTensors, check_matrix


def _shares(units: int, parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """First unit of each part and the end, in proportion to `parts`."""
    bounds = np.concatenate([[0], np.cumsum(parts)]) * units / sum(parts)
    return np.round(bounds).astype(np.int64)


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
        self._blocks = _shares(intermediate // GROUP, parts)
        self._strips = _shares(-(-hidden // STRIP_ROWS), parts)
        self._table = self._new_table()
        self._place: npt.NDArray[np.int64] = np.full(num_experts, -1, np.int64)
        """Of each expert in the arenas and in the rows of biases; -1: none."""
        self._arenas: list[Arena] = []
        rows = [round_up(size, STRIP_ROWS) for size in (0, intermediate, intermediate, hidden)]
        first = np.cumsum(rows).tolist()
        self._bias_columns = {
            name: slice(first[i], first[i + 1]) for i, name in enumerate(("gate", "up", "down"))
        }
        self._biases: npt.NDArray[np.float32] = np.zeros((0, first[-1]), np.float32)
        self._no_bias: npt.NDArray[np.float32] = np.zeros(max(rows), np.float32)
        self._closed = False
        self._pid = os.getpid()

    def _new_table(self) -> Array:
        """`records.Expert` [E, pools] of experts that are not loaded."""
        return np.zeros((self.num_experts, self.pool.pools), Expert.dtype)

    def expert_nbytes(self, pool: int) -> int:
        """Packed bytes of one expert in one pool."""
        blocks = int(self._blocks[pool + 1] - self._blocks[pool])
        strips = int(self._strips[pool + 1] - self._strips[pool])
        return blocks * self.gate_up_layout.nbytes + strips * self.down_layout.nbytes

    @property
    def nbytes(self) -> int:
        """Packed bytes held."""
        return sum(arena.nbytes for arena in self._arenas)

    def allocate(self, resident: npt.NDArray[np.bool_]) -> None:
        """Map memory for the experts in `resident` (bool [E]). May be called once.

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
        self._biases = np.zeros((len(chosen), self._biases.shape[1]), np.float32)
        for pool, nodes in enumerate(self.pool.memory_nodes):
            self._arenas.append(Arena(len(chosen) * self.expert_nbytes(pool), nodes))

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Check and pack one expert; the arrays may be reused afterwards.

        A pass of another thread finds the expert whole, or not loaded.

        Raises:
            CheckpointError: a matrix is not what the layer expects.
            IndexError: no such expert, or `allocate` did not name it.
            RuntimeError: the layer is closed, or this is a forked child.
        """
        arenas, table, biases = self._arenas, self._table, self._biases  # `close` makes new ones
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or self._place[expert] < 0:
            raise IndexError(f"expert {expert} has no memory in this layer")
        H, I = self.hidden, self.intermediate
        check_matrix(tensors.gate, self.fmt, I, H)
        check_matrix(tensors.up, self.fmt, I, H)
        check_matrix(tensors.down, self.fmt, H, I)
        place, shares = int(self._place[expert]), table[expert]
        addresses = self._load_biases(shares[0], biases[place], tensors)
        for pool, arena in enumerate(arenas):
            address = arena.address + place * self.expert_nbytes(pool)
            first, last = int(self._blocks[pool]), int(self._blocks[pool + 1])
            strips = range(first, last)
            pack_gate_up(address, strips, self.gate_up_layout, tensors.gate, tensors.up, I)
            down = address + len(strips) * self.gate_up_layout.nbytes
            first, last = int(self._strips[pool]), int(self._strips[pool + 1])
            pack_rows(down, range(first, last), self.down_layout, tensors.down, H)
            shares[pool] = (shares["gate_up"][pool] if pool == 0 else address, down, *addresses)
        publish_address(shares["gate_up"], arenas[0].address + place * self.expert_nbytes(0))
        self._check_open()

    def _load_biases(
        self, share: Any, row: npt.NDArray[np.float32], tensors: ExpertTensors
    ) -> list[int]:
        """Copy the biases into an expert's row; where gate's, up's and down's are. An expert that
        is loaded once more keeps their places: a pass may be reading them."""
        addresses = []
        for name, columns in self._bias_columns.items():
            bias, here = getattr(tensors, name).bias, row[columns]
            if bias is not None:
                here[: len(bias)] = bias
            elif self._has_bias(share, name):
                here[:] = 0
            has_bias = bias is not None or self._has_bias(share, name)
            addresses.append((here if has_bias else self._no_bias).ctypes.data)
        return addresses

    def _has_bias(self, share: Any, name: str) -> bool:
        """Whether an expert, of which this is the share of a pool, has been loaded with one."""
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
        place, strips = int(self._place[expert]), []
        for pool, arena in enumerate(self._arenas):
            size = self.expert_nbytes(pool)
            packed = arena.bytes[place * size : (place + 1) * size]
            share = self._table[expert, pool]
            split = int(share["down"] - share["gate_up"])
            strips.append((packed[:split], packed[split:]))
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
                bias = self._biases[place, self._bias_columns[name]][: len(matrix.codes)]
                matrices[name] = replace(matrix, bias=bias.copy())
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
        self._biases = self._biases[:0].copy()
