"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.decode import Decoder, Mask, Meaning, split
from tests.gpu.simulator.memory import Piece, check_alignment
from tests.gpu.simulator.numbers import POISON, TYPES, UNSIGNED, Array
from tests.gpu.simulator.parse import Instruction

if TYPE_CHECKING:
    from tests.gpu.simulator.execute import Warps


def _space(instruction: Instruction) -> str:
    """Of an address; generic ones are not known, nor hints to the cache, which are operands."""
    known = {"global": "global", "param": "param", "shared": "shared", "shared::cta": "shared"}
    spaces = [known[part] for part in instruction.op if part in known]
    if any("cache_hint" in part for part in instruction.op) or len(spaces) != 1:
        raise KeyError(instruction.op)
    return spaces[0]


def pieces(
    warps: Warps, instruction: Instruction, space: str, address: Array, lanes: Array, size: int
) -> list[Piece]:
    """Checks and counts an access of `size` bytes at address[lanes]."""
    there, batch = address[lanes], warps.batch
    check_alignment(there, size)
    if space == "shared":
        found = batch.shared.pieces(warps.block[lanes], there, size)
    else:
        found = batch.memory.pieces(there, size)
    if batch.lint is not None:
        for which, segment, _ in found:
            mask = np.zeros(warps.n, bool)
            mask[lanes[which]] = True
            batch.lint.count(instruction, segment, size, address, mask)
    return found


def _load(instruction: Instruction) -> Meaning:
    space, dtype = _space(instruction), TYPES[instruction.op[-1]]
    count = len(split(instruction.args[0]))

    def load_param(warps: Warps, mask: Mask, place: Array) -> Array:
        return np.frombuffer(warps.batch.params, dtype, count, place[0])[:, None]

    def load(warps: Warps, mask: Mask, address: Array) -> Array:
        uniform = mask is None and address.size == 1 and space == "global"
        address, lanes = np.broadcast_to(address, warps.n), warps.lanes(mask)
        values = np.empty((warps.n, count), UNSIGNED[dtype.itemsize])
        for which, segment, offset in pieces(
            warps, instruction, space, address, lanes, count * dtype.itemsize
        ):
            values[lanes[which]] = segment.load(offset, dtype.itemsize, count)
        return np.ascontiguousarray((values[:1] if uniform else values).T).view(dtype)

    kind = "u64" if space == "global" else "u32"
    return Meaning(load_param if space == "param" else load, [kind], together=True)


def _store(instruction: Instruction) -> Meaning:
    space, kind = _space(instruction), f"u{TYPES[instruction.op[-1]].itemsize * 8}"

    def store(warps: Warps, mask: Mask, address: Array, *columns: Array) -> None:
        address, lanes = np.broadcast_to(address, warps.n), warps.lanes(mask)
        values = np.stack([np.broadcast_to(column, warps.n) for column in columns], 1)[lanes]
        size = values.itemsize * len(columns)
        for which, segment, offset in pieces(warps, instruction, space, address, lanes, size):
            segment.store(offset, values[which])

    address_kind = "u64" if space == "global" else "u32"
    return Meaning(store, [address_kind, kind], together=True, dests=False)


def _copy(instruction: Instruction) -> Meaning:
    """cp.async, its commit_group, wait_group and wait_all."""
    op, args = instruction.op, instruction.args
    if op[2] == "commit_group":
        return Meaning(lambda warps, mask: warps.commit_copies(mask), ["u32"], True, False)
    if op[2] in ("wait_group", "wait_all"):
        keep = Decoder.constant(args[0]) if op[2] == "wait_group" else -1
        return Meaning(lambda w, m, *_: w.finish_copies(m, keep), ["u32"], True, False)
    if op[1] != "async" or op[2] not in ("ca", "cg") or any("cache_hint" in part for part in op):
        raise KeyError(op)
    size = Decoder.constant(args[2])

    def copy(warps: Warps, mask: Mask, to: Array, address: Array, *sizes: Array) -> None:
        # sizes: bytes that are written, and those of them that are read; the others become zeros
        to, address = np.broadcast_to(to, warps.n), np.broadcast_to(address, warps.n)
        lanes, used = warps.lanes(mask), np.broadcast_to(sizes[-1], warps.n)
        if (used > size).any():
            raise ValueError(f"cp.async of {used.max()} bytes into {size}")
        data = np.zeros((warps.n, size), np.uint8)
        reading = lanes[used[lanes] == size]
        if reading.size:
            for which, segment, offset in pieces(
                warps, instruction, "global", address, reading, size
            ):
                data[reading[which]] = segment.load(offset, 1, size)
        for lane in lanes[(used[lanes] < size) & (used[lanes] > 0)]:
            check_alignment(address[lane : lane + 1], size)
            length = int(used[lane])
            ((_, segment, offset),) = warps.batch.memory.pieces(address[lane : lane + 1], length)
            data[lane, :length] = segment.data[offset[0] : offset[0] + length]
        (landing,) = pieces(warps, instruction, "shared", to, lanes, size)
        warps.start_copy(lanes, landing, data[lanes])

    return Meaning(copy, ["u32", "u64", "u32"], together=True, dests=False)


ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


def _atomic(instruction: Instruction) -> Meaning:
    """atom and red, one lane after another."""
    op, space, kind = instruction.op, _space(instruction), instruction.op[-1]
    name = next(part for part in (*op, "") if part in (*ATOMIC, "cas", ""))
    if not name or "f16" in kind or {"v2", "v4", "v8"} & set(op):
        raise KeyError(op)
    dtype = TYPES[kind]

    def atomic(warps: Warps, mask: Mask, address: Array, *sources: Array) -> list[Array]:
        address, lanes = np.broadcast_to(address, warps.n), warps.lanes(mask)
        operands = [np.broadcast_to(source, warps.n) for source in sources]
        before = np.full(warps.n, POISON, np.uint64).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        for which, segment, offset in pieces(
            warps, instruction, space, address, lanes, dtype.itemsize
        ):
            cells = segment.data[: segment.data.size // dtype.itemsize * dtype.itemsize].view(dtype)
            for lane, cell in zip(lanes[which], offset // dtype.itemsize, strict=True):
                old = before[lane] = cells[cell]
                new = operands[-1][lane : lane + 1]
                if name == "cas":
                    cells[cell] = new[0] if old == operands[0][lane] else old
                else:
                    cells[cell] = ATOMIC[name](cells[cell : cell + 1], new)[0]
        return [before]

    kinds = ["u64" if space == "global" else "u32", kind]
    return Meaning(atomic, kinds, together=True, dests=op[0] == "atom")


def meaning(instruction: Instruction) -> Meaning | None:
    """Of an instruction that accesses memory."""
    decoders = {"ld": _load, "st": _store, "cp": _copy, "atom": _atomic, "red": _atomic}
    decode = decoders.get(instruction.op[0])
    return decode(instruction) if decode else None
