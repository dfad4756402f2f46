"""Experts out of the packed layer, in the layout that a GPU layer is filled from.

A runtime that prefills whole layers on GPUs asks for one expert at a time, cut for its tensor
parallel ranks, in host buffers from which it copies on:

    per rank r of n, with I/n of the intermediate dimension:
    w13   [2 I/n, H]  the rank's rows of gate, then the same rows of up
    w2    [H, I/n]    the rank's columns of down

Codes are the checkpoint's. E8M0 scales become bf16, which holds each power of two exactly: so
kt-kernel hands them over, and so its callers size their buffers. Other scales stay as they are; a
scale for a whole row goes to each rank. A format without scales has none. Formats with more arrays
than codes and scales (zero points, minima, upper bits) lie in other ways on GPUs, and are refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.numbers import UE8M0, Array, f32_to_bf16
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.parallel import map_all
from hybrid_moe.runtime import arguments
from hybrid_moe.runtime.arguments import LayerShape


@dataclass(frozen=True)
class RankBuffers:
    """Addresses of the host buffers of each rank; those of scales are 0 without scales."""

    w13_weight: list[int]
    w13_scale: list[int]
    w2_weight: list[int]
    w2_scale: list[int]

    @classmethod
    def checked(cls, ranks: int, formats: LayerFormats, given: dict[str, Any]) -> RankBuffers:
        """The four lists of pointers, one per rank.

        Raises:
            TypeError: not a list of integers.
            ValueError: not one per rank, or null where something will be written.
        """
        lists = {name: _addresses(name, pointers) for name, pointers in given.items()}
        for name, addresses in lists.items():
            fmt = formats.gate_up if name.startswith("w13") else formats.down
            needed = name.endswith("weight_ptrs") or fmt.scale is not None
            if len(addresses) != ranks and (needed or addresses):
                raise ValueError(
                    f"{name} has {len(addresses)} pointers, must have one for each of the "
                    f"{ranks} ranks of gpu_tp_count"
                )
            if needed and min(addresses) <= 0:
                rank = int(np.argmin(addresses))
                raise ValueError(f"{name}[{rank}] is {addresses[rank]}, must be an address")
        return cls(*lists.values())


def _addresses(name: str, pointers: Any) -> list[int]:
    if not isinstance(pointers, Iterable):
        raise TypeError(f"{name} must be a list of addresses, not {pointers!r}")
    return [arguments.integer(f"a pointer in {name}", pointer) for pointer in pointers]


class ExpertWriter:
    """Writes a layer's experts one after the other: a thread of its own keeps the order, and as
    many as the layer's pools have copy."""

    def __init__(self, layer: ExpertLayer, shape: LayerShape) -> None:
        self._layer, self._shape = layer, shape
        self._order: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def submit(self, gpu_tp_count: Any, expert_id: Any, pointers: dict[str, Any]) -> None:
        """See `KTMoEWrapper.submit_write_weight_scale_to_buffer`."""
        ranks = arguments.integer("gpu_tp_count", gpu_tp_count)
        expert = arguments.integer("expert_id", expert_id)
        gate_up, down = formats = self._layer.formats
        _check_planes(formats)
        I = self._shape.moe_intermediate_size
        multiple = max(gate_up.scale_rows, down.k_multiple, down.group)
        if ranks < 1 or I % ranks or (ranks > 1 and I // ranks % multiple):
            raise ValueError(
                f"gpu_tp_count is {ranks}, must cut moe_intermediate_size {I} into multiples of "
                f"{multiple}"
            )
        buffers = RankBuffers.checked(ranks, formats, pointers)
        self._layer.check_readable(expert)
        if self._order is None:
            self._order = ThreadPoolExecutor(1, thread_name_prefix="hybrid-moe-export")
        self._pending.append(self._order.submit(self._write, ranks, expert, buffers))

    def sync(self) -> None:
        """Wait for all that was submitted; raise the first error."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.exception()  # wait for each, so that no buffer is written after an error
        for future in pending:
            future.result()

    def wait(self) -> None:
        """Wait for all that was submitted; `sync` says how it ended."""
        if self._pending:
            wait(self._pending)

    def close(self) -> None:
        """Wait, and end the thread."""
        if self._order is not None:
            self._order.shutdown()
        self._order, self._pending = None, []

    def _write(self, ranks: int, expert: int, buffers: RankBuffers) -> None:
        copy_all = partial(map_all, threads=self._layer.pool.threads)
        tensors = self._layer.unpack(expert, copy_all)
        gate_up, down = self._layer.formats
        I = self._shape.moe_intermediate_size // ranks
        for r in range(ranks):
            rows = slice(r * I, (r + 1) * I)
            gate, up = tensors.gate.rows(rows), tensors.up.rows(rows)
            w2 = _columns(tensors.down, down, r, ranks)
            for weight, scale, parts, fmt in (
                (buffers.w13_weight, buffers.w13_scale, (gate, up), gate_up),
                (buffers.w2_weight, buffers.w2_scale, (w2,), down),
            ):
                _copy(weight[r], [part.codes for part in parts])
                if fmt.scale is not None:
                    scales = [part.scales for part in parts if part.scales is not None]
                    if fmt.scale is UE8M0:
                        scales = [f32_to_bf16(fmt.scale.decode(s)) for s in scales]
                    _copy(scale[r], scales)


def _check_planes(formats: LayerFormats) -> None:
    """Raise `NotImplementedError` for a format that a GPU has otherwise than checkpoints."""
    for fmt in formats.each:
        more = [plane.name for plane in fmt.planes if plane.name not in ("codes", "scales")]
        if more:
            raise NotImplementedError(
                f"experts in {fmt.name} are not written to a GPU's buffers: beside codes and "
                f"scales they have {' and '.join(more)}, which each GPU kernel has in its own way"
            )


def _columns(matrix: Matrix, fmt: WeightFormat, rank: int, ranks: int) -> Matrix:
    """A rank's columns; a scale for all of a row is every rank's."""

    def part(array: Array) -> Array:
        width = -(-array.shape[1] // ranks)
        return array[:, rank * width : (rank + 1) * width]

    scales = matrix.scales
    if scales is not None and fmt.group:
        scales = part(scales)
    return Matrix(part(matrix.codes), scales)


def _copy(address: int, parts: list[Array]) -> None:
    """Write `parts`, one behind the other, to `address`."""
    for part in parts:
        memory = memoryview((ctypes.c_uint8 * part.nbytes).from_address(address))
        np.copyto(np.ndarray(part.shape, part.dtype, memory), part)
        address += part.nbytes
