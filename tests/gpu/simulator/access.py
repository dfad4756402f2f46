"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.memory import SECTOR, Piece, check_alignment, gather, scatter
from tests.gpu.simulator.numbers import POISON, TYPES, UNSIGNED, Array

if TYPE_CHECKING:
    from tests.gpu.simulator.decode import Decoder, Mask, Step
    from tests.gpu.simulator.execute import Warps

Op = tuple[str, ...]
Args = tuple[str, ...]
Where = Callable[["Warps"], Array]
"""Addresses of all lanes, int64."""


def _where(d: Decoder, arg: str, shared: bool) -> Where:
    base, offset = d.address(arg)
    # an address in shared memory has 32 bits, in whatever register it comes
    source = d.source(base, "u32" if shared else "u64")

    def where(warps: Warps) -> Array:
        address = source(warps.R).astype(np.int64)
        return address + offset if offset else address

    return where


def _pieces(
    warps: Warps, op: Any, space: str, address: Array, lanes: Any, mask: Mask, size: int
) -> list[Piece]:
    """Checks and counts an access of `size` bytes at address[lanes]."""
    there = address if lanes is None else address[lanes]
    check_alignment(there, size)
    batch = warps.batch
    if space == "shared":
        blocks = warps.block if lanes is None else warps.block[lanes]
        pieces, names = [batch.shared.piece(blocks, there, size)], [""]
    else:
        found = list(batch.memory.pieces(there, size))
        pieces, names = [piece for _, piece in found], [segment.name for segment, _ in found]
        if op.op[0] != "st":
            for segment, (_, _, offset) in found:
                for byte in range(0, size, SECTOR):
                    segment.read[(offset + byte) // SECTOR] = True
    if batch.lint is not None:
        full = np.broadcast_to(address, warps.n)
        active = np.ones(warps.n, bool) if mask is None else mask
        for name, (which, _, _) in zip(names, pieces, strict=True):
            of_piece = active
            if which is not None:
                of_piece = np.zeros(warps.n, bool)
                of_piece[(np.arange(warps.n) if lanes is None else lanes)[which]] = True
            batch.lint.count(op, space, name, size, full, of_piece)
    return pieces


def _space(d: Decoder, op: Op) -> str:
    for part in op:
        if part.startswith(("global", "shared", "param")):
            if part.endswith("::cluster"):
                raise d.unknown()
            return part.partition("::")[0]
    raise d.unknown()  # a generic address


def _vector(op: Op) -> int:
    return next((int(part[1:]) for part in op if part in ("v2", "v4", "v8")), 1)


def _ld(d: Decoder, op: Op, args: Args) -> Step:
    space, count, kind = _space(d, op), _vector(op), op[-1]
    dtype = TYPES[kind]
    word = dtype.itemsize
    puts = [d.sink(name) for name in d.vector(args[0])]
    if space == "param":
        name, offset = d.address(args[1])
        place = d.kernel.params[name][0] + offset

        def load_param(warps: Warps, mask: Mask) -> None:
            values = np.frombuffer(warps.batch.params, dtype, len(puts), place)
            for i, put in enumerate(puts):
                put(warps, values[i : i + 1], mask)

        return load_param
    where = _where(d, args[1], space == "shared")
    instruction = d.instruction

    def load(warps: Warps, mask: Mask) -> None:
        address = where(warps)
        lanes = None
        if mask is not None:
            address, lanes = np.broadcast_to(address, warps.n), np.nonzero(mask)[0]
        elif space == "shared":
            address = np.broadcast_to(address, warps.n)
        pieces = _pieces(warps, instruction, space, address, lanes, mask, word * count)
        if lanes is None and len(pieces) == 1:
            values = gather(pieces[0], word, count)
        else:
            values = np.zeros((warps.n, count), UNSIGNED[word])
            index = np.arange(warps.n) if lanes is None else lanes
            for piece in pieces:
                values[index if piece[0] is None else index[piece[0]]] = gather(piece, word, count)
        for i, put in enumerate(puts):
            put(warps, np.ascontiguousarray(values[:, i]).view(dtype), mask)

    return load


def _st(d: Decoder, op: Op, args: Args) -> Step:
    space, kind = _space(d, op), op[-1]
    word = TYPES[kind].itemsize
    where = _where(d, args[0], space == "shared")
    sources = [d.source(name, f"u{8 * word}") for name in d.vector(args[1])]
    instruction = d.instruction

    def store(warps: Warps, mask: Mask) -> None:
        address = np.broadcast_to(where(warps), warps.n)
        lanes = None if mask is None else np.nonzero(mask)[0]
        values = np.empty((warps.n, len(sources)), UNSIGNED[word])
        for i, source in enumerate(sources):
            values[:, i] = source(warps.R)
        if lanes is not None:
            values = values[lanes]
        size = word * len(sources)
        for piece in _pieces(warps, instruction, space, address, lanes, mask, size):
            scatter(piece, values if piece[0] is None else values[piece[0]])

    return store


# ---- asynchronous copies


def _cp(d: Decoder, op: Op, args: Args) -> Step:
    if op[1] != "async" or "bulk" in op or "mbarrier" in op:
        raise d.unknown()
    if op[2] == "commit_group":
        return lambda warps, mask: warps.commit_copies(mask)
    if op[2] == "wait_group":
        keep = d.constant(args[0])
        assert keep is not None
        return lambda warps, mask: warps.finish_copies(mask, keep)
    if op[2] == "wait_all":

        def wait_all(warps: Warps, mask: Mask) -> None:
            warps.commit_copies(mask)
            warps.finish_copies(mask, 0)

        return wait_all
    size = d.constant(args[2])
    if size not in (4, 8, 16) or len(args) > 4 or (len(args) == 4 and "cache_hint" in op[-1]):
        raise d.unknown()
    target, origin = _where(d, args[0], True), _where(d, args[1], False)
    # the bytes that are read; the others of `size` become zeros
    used = d.source(args[3] if len(args) == 4 else args[2], "u32")
    instruction = d.instruction

    def copy(warps: Warps, mask: Mask) -> None:
        lanes = np.arange(warps.n) if mask is None else np.nonzero(mask)[0]
        to, address = (np.broadcast_to(w(warps), warps.n) for w in (target, origin))
        lengths = np.broadcast_to(used(warps.R), warps.n)[lanes]
        data = np.zeros((len(lanes), size), np.uint8)
        for length in np.unique(lengths):
            if length > size:
                raise ValueError(f"cp.async of {length} bytes into {size}")
            of_length = lengths == length
            some = lanes[of_length]
            check_alignment(address[some], size)
            if length == size:
                active = np.zeros(warps.n, bool)
                active[some] = True
                rows = np.nonzero(of_length)[0]
                for piece in _pieces(warps, instruction, "global", address, some, active, size):
                    picked = rows if piece[0] is None else rows[piece[0]]
                    data[picked] = gather(piece, 1, size)
            elif length:
                rows = np.nonzero(of_length)[0]
                for segment, (which, memory, offset) in warps.batch.memory.pieces(
                    address[some], int(length)
                ):
                    segment.read[offset // SECTOR] = True
                    picked = rows if which is None else rows[which]
                    data[picked, :length] = memory[offset[:, None] + np.arange(length)]
        (landing,) = _pieces(warps, instruction, "shared", to, lanes, mask, size)
        warps.start_copy(lanes, landing, data)

    return copy


# ---- atomics

ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


def _atomic(d: Decoder, op: Op, args: Args) -> Step:
    """atom and red, one lane after another."""
    space, kind = _space(d, op), op[-1]
    name = next((part for part in op if part in (*ATOMIC, "cas")), "")
    if not name or _vector(op) != 1 or kind in ("bf16", "f16", "bf16x2", "f16x2"):
        raise d.unknown()
    dest, address_arg, *values = args if op[0] == "atom" else ("_", *args)
    put, where = d.sink(dest), _where(d, address_arg, space == "shared")
    sources = [d.source(value, kind) for value in values]
    dtype, instruction = TYPES[kind], d.instruction

    def step(warps: Warps, mask: Mask) -> None:
        lanes = np.arange(warps.n) if mask is None else np.nonzero(mask)[0]
        address = np.broadcast_to(where(warps), warps.n)
        operands = [np.broadcast_to(source(warps.R), warps.n)[lanes] for source in sources]
        before = np.full(warps.n, POISON, np.uint64).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        pieces = _pieces(warps, instruction, space, address, lanes, mask, dtype.itemsize)
        for which, data, offsets in pieces:
            cells = data[: data.size // dtype.itemsize * dtype.itemsize].view(dtype)
            picked = np.arange(len(lanes)) if which is None else np.nonzero(which)[0]
            for i, cell in zip(picked, offsets // dtype.itemsize, strict=True):
                old = cells[cell]
                before[lanes[i]] = old
                if name == "cas":
                    cells[cell] = operands[1][i] if old == operands[0][i] else old
                else:
                    cells[cell] = ATOMIC[name](cells[cell : cell + 1], operands[0][i : i + 1])[0]
        put(warps, before, mask)

    return step


DECODERS: dict[str, Callable[[Decoder, Op, Args], Step]] = {
    "ld": _ld,
    "st": _st,
    "cp": _cp,
    "atom": _atomic,
    "red": _atomic,
}
