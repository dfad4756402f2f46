"""What the lanes of a warp do together: shuffles, votes, reductions, ldmatrix, mma.

Arrays are seen as [warps, 32]. All lanes that an instruction names must execute it together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.memory import check_alignment, gather
from tests.gpu.simulator.numbers import Array, from_bf16

if TYPE_CHECKING:
    from tests.gpu.simulator.decode import Decoder, Mask, Step
    from tests.gpu.simulator.execute import Warps

Op = tuple[str, ...]
Args = tuple[str, ...]
LANE = np.arange(32)
EVERY = np.uint32(0xFFFFFFFF)


def _rows(warps: Warps, value: Array) -> Array:
    return np.broadcast_to(value, warps.n).reshape(-1, 32)


def _ballot(rows: Array) -> Array:
    """[warps, 32] bool -> uint32 [warps, 1]."""
    bits = np.packbits(rows, axis=1, bitorder="little")
    return np.asarray(bits.view(np.uint32))


def _active(warps: Warps, mask: Mask) -> Array:
    return np.ones((warps.n // 32, 32), bool) if mask is None else mask.reshape(-1, 32)


def _together(warps: Warps, mask: Mask, members: Array, what: str) -> None:
    """The lanes that `members` names are those of the warp that execute this."""
    if mask is None and (members == EVERY).all():
        return
    active = _active(warps, mask)
    present = np.repeat(_ballot(active), 32, 1)
    if (active & (_rows(warps, members) & ~present != 0)).any():
        raise RuntimeError(f"{what}: lanes of its mask are elsewhere (the warp has diverged)")
    if (active & ((_rows(warps, members) >> LANE.astype(np.uint32)) & np.uint32(1) == 0)).any():
        raise RuntimeError(f"{what}: executed by a lane that its mask does not name")


def _shfl(d: Decoder, op: Op, args: Args) -> Step:
    mode = op[2]
    dest, _, valid = args[0].partition("|")
    put, put_valid = d.sink(dest), d.sink(valid or "_")
    value, amount, clamp, members = (d.source(arg, "u32") for arg in args[1:])

    def step(warps: Warps, mask: Mask) -> None:
        _together(warps, mask, members(warps.R), "shfl.sync")
        b = _rows(warps, amount(warps.R)).astype(np.int64) & 31
        c = _rows(warps, clamp(warps.R)).astype(np.int64)
        segment = c >> 8 & 31
        last = (LANE & segment) | (c & 31 & ~segment)
        first = LANE & segment
        if mode == "up":
            from_lane = LANE - b
            inside = from_lane >= last
        else:
            from_lane = {"down": LANE + b, "bfly": LANE ^ b, "idx": first | (b & ~segment)}[mode]
            inside = from_lane <= last
        from_lane = np.where(inside, from_lane, LANE)
        if mask is not None:
            active = _active(warps, mask)
            if (active & ~np.take_along_axis(active, from_lane & 31, 1)).any():
                raise RuntimeError("shfl.sync reads a lane that does not take part")
        rows = np.take_along_axis(_rows(warps, value(warps.R)), from_lane & 31, 1)
        put(warps, rows.reshape(-1), mask)
        put_valid(warps, inside.reshape(-1), mask)

    return step


def _vote(d: Decoder, op: Op, args: Args) -> Step:
    mode = op[2]
    put = d.sink(args[0])
    predicate, members = d.source(args[1], "pred"), d.source(args[2], "u32")

    def step(warps: Warps, mask: Mask) -> None:
        named = members(warps.R)
        _together(warps, mask, named, "vote.sync")
        active = _active(warps, mask)
        count = np.repeat(_ballot(_rows(warps, predicate(warps.R)) & active), 32, 1).reshape(-1)
        result = {
            "ballot": lambda: count,
            "any": lambda: count != 0,
            "all": lambda: count == named,
            "uni": lambda: (count == named) | (count == 0),
        }[mode]()
        put(warps, result, mask)

    return step


def _activemask(d: Decoder, op: Op, args: Args) -> Step:
    put = d.sink(args[0])
    return lambda warps, mask: put(
        warps, np.repeat(_ballot(_active(warps, mask)), 32, 1).reshape(-1), mask
    )


def _match(d: Decoder, op: Op, args: Args) -> Step:
    if op[1:3] != ("any", "sync"):
        raise d.unknown()
    put = d.sink(args[0])
    value, members = d.source(args[1], op[-1]), d.source(args[2], "u32")

    def step(warps: Warps, mask: Mask) -> None:
        _together(warps, mask, members(warps.R), "match.sync")
        rows = _rows(warps, value(warps.R))
        same = (rows[:, :, None] == rows[:, None, :]) & _active(warps, mask)[:, None, :]
        put(warps, _ballot(same.reshape(-1, 32)).reshape(-1), mask)

    return step


def _redux(d: Decoder, op: Op, args: Args) -> Step:
    reduce: Any = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[op[2]]
    if op[-1] == "f32":
        raise d.unknown()
    put = d.sink(args[0])
    value, members = d.source(args[1], op[-1]), d.source(args[2], "u32")

    def step(warps: Warps, mask: Mask) -> None:
        _together(warps, mask, members(warps.R), "redux.sync")
        rows = _rows(warps, value(warps.R))
        result = np.zeros((len(rows), 1), rows.dtype)
        for i, active in enumerate(_active(warps, mask)):
            if active.any():
                result[i] = reduce.reduce(rows[i][active], dtype=rows.dtype)
        put(warps, np.repeat(result, 32, 1).reshape(-1), mask)

    return step


def _elect(d: Decoder, op: Op, args: Args) -> Step:
    dest, _, leads = args[0].partition("|")
    put, put_leads = d.sink(dest), d.sink(leads)
    members = d.source(args[1], "u32")

    def step(warps: Warps, mask: Mask) -> None:
        _together(warps, mask, members(warps.R), "elect.sync")
        leader = np.repeat(_active(warps, mask).argmax(1).astype(np.uint32), 32)
        put(warps, leader, mask)
        put_leads(warps, leader == np.tile(LANE, warps.n // 32), mask)

    return step


def _whole(warps: Warps, mask: Mask, what: str) -> None:
    if mask is not None:
        active = mask.reshape(-1, 32)
        if (active.any(1) & ~active.all(1)).any():
            raise RuntimeError(f"{what} executed by part of a warp (it has diverged)")


def _ldmatrix(d: Decoder, op: Op, args: Args) -> Step:
    if "m8n8" not in op or op[-1] != "b16":
        raise d.unknown()
    puts = [d.sink(name) for name in d.vector(args[0])]
    base, offset = d.address(args[1])
    source, instruction = d.source(base, "u32"), d.instruction
    count = len(puts)

    def step(warps: Warps, mask: Mask) -> None:
        _whole(warps, mask, "ldmatrix")
        active = _active(warps, mask).any(1)
        rows = _rows(warps, source(warps.R))[active, : 8 * count].astype(np.int64) + offset
        check_alignment(rows.reshape(-1), 16)
        block = _rows(warps, warps.block)[active, : 8 * count]
        piece = warps.batch.shared.piece(block.reshape(-1), rows.reshape(-1), 16)
        matrices = gather(piece, 2, 8).reshape(-1, count, 8, 8)
        if "trans" in op:
            matrices = matrices.swapaxes(2, 3)
        lanes = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        if warps.batch.lint is not None:  # each matrix is a request of 8 lanes with 16 bytes
            some = np.zeros((count, len(rows), 32), np.int64)
            some[:, :, :8] = rows.reshape(-1, count, 8).swapaxes(0, 1)
            taking = np.zeros_like(some, bool)
            taking[:, :, :8] = True
            warps.batch.lint.count(
                instruction, "shared", "", 16, some.reshape(-1), taking.reshape(-1)
            )
        for i, put in enumerate(puts):
            value = np.zeros((warps.n // 32, 32), np.uint32)
            value[active] = lanes[:, i]
            put(warps, value.reshape(-1), mask)

    return step


def _mma(d: Decoder, op: Op, args: Args) -> Step:
    """D[16, 8] = A[16, 16] @ B[16, 8] + C, bf16 in, exact sums (float64) rounded once to float32.

    Lane 4g + q holds A[g + 8(i % 2), 2q + 8(i // 2) + e] in half e of its register i of 4,
    B[2q + 8i + e, g] in register i of 2, and C[g + 8(i // 2), 2q + i % 2] in register i of 4.
    """
    if op != tuple("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32".split(".")):
        raise d.unknown()
    puts = [d.sink(name) for name in d.vector(args[0])]
    a, b = ([d.source(name, "u32") for name in d.vector(arg)] for arg in args[1:3])
    c = [d.source(name, "f32") for name in d.vector(args[3])]

    def fragment(warps: Warps, sources: list[Any]) -> Array:
        """float64 [warps, register, g, q, half]"""
        registers = np.empty((warps.n // 32, len(sources), 32), np.uint32)
        for i, source in enumerate(sources):
            registers[:, i] = _rows(warps, source(warps.R))
        halves = from_bf16(registers.view(np.uint16)).astype(np.float64)
        return halves.reshape(-1, len(sources), 8, 4, 2)

    def step(warps: Warps, mask: Mask) -> None:
        _whole(warps, mask, "mma")
        count = warps.n // 32
        rows = fragment(warps, a).reshape(count, 2, 2, 8, 4, 2)  # [w, i // 2, i % 2, g, q, e]
        A = rows.transpose(0, 2, 3, 1, 4, 5).reshape(count, 16, 16)
        B = fragment(warps, b).transpose(0, 1, 3, 4, 2).reshape(count, 16, 8)
        product = np.matmul(A, B).reshape(count, 2, 8, 4, 2)  # [w, i // 2, g, q, i % 2]
        for i, (put, addend) in enumerate(zip(puts, c, strict=True)):
            part = product[:, i // 2, :, :, i % 2].reshape(-1)
            put(warps, (part + addend(warps.R)).astype(np.float32), mask)

    return step


DECODERS: dict[str, Callable[[Decoder, Op, Args], Step]] = {
    "shfl": _shfl,
    "vote": _vote,
    "activemask": _activemask,
    "match": _match,
    "redux": _redux,
    "elect": _elect,
    "ldmatrix": _ldmatrix,
    "mma": _mma,
}
