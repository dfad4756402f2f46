"""What the lanes of a warp do together: shuffles, votes, reductions, ldmatrix, mma.

Arrays are seen as [warps, 32]. All lanes that an instruction names must execute it together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.access import pieces
from tests.gpu.simulator.decode import Mask, Meaning, split
from tests.gpu.simulator.numbers import TYPES, Array, from_bf16
from tests.gpu.simulator.parse import Instruction

if TYPE_CHECKING:
    from tests.gpu.simulator.execute import Warps

LANE = np.arange(32)
EVERY = np.uint32(0xFFFFFFFF)


def _rows(warps: Warps, value: Array) -> Array:
    return np.broadcast_to(value, warps.n).reshape(-1, 32)


def _ballot(rows: Array) -> Array:
    """[warps, 32] bool -> uint32 [lanes], a warp's word in all its lanes."""
    return np.repeat(np.packbits(rows, axis=1, bitorder="little").view(np.uint32), 32)


def _active(warps: Warps, mask: Mask, members: Array | None, what: str) -> Array:
    """[warps, 32]: the lanes at work, which must be those that `members` names; None: all or
    none of a warp."""
    if mask is None and (members is None or (members == EVERY).all()):
        return np.ones((warps.n // 32, 32), bool)
    active = np.ones((warps.n // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
    named = _rows(warps, EVERY if members is None else members)
    if (active & (named & ~_ballot(active).reshape(-1, 32) != 0)).any():
        raise RuntimeError(f"{what}: the warp has diverged, lanes that it names are elsewhere")
    if (active & (named >> LANE.astype(np.uint32) & np.uint32(1) == 0)).any():
        raise RuntimeError(f"{what}: executed by a lane that its mask does not name")
    return active


def _shuffle(instruction: Instruction) -> Meaning:
    mode = instruction.op[2]

    def shuffle(warps: Warps, mask: Mask, value: Array, b: Array, c: Array, members: Array) -> Any:
        active = _active(warps, mask, members, "shfl.sync")
        b, c = (_rows(warps, x).astype(np.int64) for x in (b & 31, c))
        segment = c >> 8 & 31
        first, last = LANE & segment, (LANE & segment) | (c & 31 & ~segment)
        origin = {
            "up": LANE - b,
            "down": LANE + b,
            "bfly": LANE ^ b,
            "idx": first | (b & ~segment),
        }[mode]
        inside = origin >= last if mode == "up" else origin <= last
        origin = np.where(inside, origin, LANE)
        if (active & ~np.take_along_axis(active, origin, 1)).any():
            raise RuntimeError("shfl.sync reads a lane that does not take part")
        return np.take_along_axis(_rows(warps, value), origin, 1).reshape(-1), inside.reshape(-1)

    return Meaning(shuffle, ["u32"], together=True)


def _vote(instruction: Instruction) -> Meaning:
    mode = instruction.op[2]

    def vote(warps: Warps, mask: Mask, predicate: Array, members: Array) -> list[Array]:
        active = _active(warps, mask, members, "vote.sync")
        true = _ballot(_rows(warps, predicate) & active)
        if mode == "ballot":
            return [true]
        return [
            {"any": true != 0, "all": true == members, "uni": (true == 0) | (true == members)}[mode]
        ]

    return Meaning(vote, ["pred", "u32"], together=True)


def _match(instruction: Instruction) -> Meaning:
    if instruction.op[1:3] != ("any", "sync"):
        raise KeyError("match.all")

    def match(warps: Warps, mask: Mask, value: Array, members: Array) -> list[Array]:
        active, rows = _active(warps, mask, members, "match.sync"), _rows(warps, value)
        same = (rows[:, :, None] == rows[:, None, :]) & active[:, None, :]
        return [np.packbits(same, axis=2, bitorder="little").view(np.uint32).reshape(-1)]

    return Meaning(match, [instruction.op[-1], "u32"], together=True)


def _reduce(instruction: Instruction) -> Meaning:
    names = {"add": "add", "min": "minimum", "max": "maximum"}
    name = instruction.op[2]
    function = getattr(np, names.get(name, f"bitwise_{name}"))
    dtype = TYPES[instruction.op[-1]]
    if dtype.kind == "f":
        raise KeyError("redux.f32")

    def reduce(warps: Warps, mask: Mask, value: Array, members: Array) -> list[Array]:
        result = np.zeros(warps.n // 32, dtype)
        active = _active(warps, mask, members, "redux.sync")
        for i, row in enumerate(_rows(warps, value)):
            if active[i].any():
                result[i] = function.reduce(row[active[i]], dtype=dtype)
        return [np.repeat(result, 32)]

    return Meaning(reduce, [instruction.op[-1], "u32"], together=True)


def _elect(warps: Warps, mask: Mask, members: Array) -> tuple[Array, Array]:
    leader = _active(warps, mask, members, "elect.sync").argmax(1)
    return np.repeat(leader, 32), (leader[:, None] == LANE).reshape(-1)


def _ldmatrix(instruction: Instruction) -> Meaning:
    if instruction.op[3] != "m8n8" or instruction.op[-1] != "b16":
        raise KeyError(instruction.op)
    count = len(split(instruction.args[0]))

    def ldmatrix(warps: Warps, mask: Mask, address: Array) -> list[Array]:
        warp = _active(warps, mask, None, "ldmatrix")[:, 0]
        results, address = [], np.broadcast_to(address, warps.n)
        for j in range(count):  # a request of 8 lanes, which have the addresses of its rows
            lanes = np.nonzero((warp[:, None] & np.equal(LANE // 8, j)).reshape(-1))[0]
            found = pieces(warps, instruction, "shared", address, lanes, 16)
            ((_, segment, offset),) = found
            matrices = segment.load(offset, 2, 8).reshape(-1, 8, 8)
            if "trans" in instruction.op:
                matrices = matrices.swapaxes(1, 2)
            result = np.zeros((warps.n // 32, 32), np.uint32)
            result[warp] = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 32)
            results.append(result.reshape(-1))
        return results

    return Meaning(ldmatrix, ["u32"], together=True)


def _mma(warps: Warps, mask: Mask, *registers: Array) -> list[Array]:
    """D[16, 8] = A[16, 16] @ B[16, 8] + C, bf16 in, exact sums (float64) rounded once to float32.

    Lane 4g + q holds A[g + 8(i % 2), 2q + 8(i // 2) + e] in half e of its register i of 4,
    B[2q + 8i + e, g] in register i of 2, and C[g + 8(i // 2), 2q + i % 2] in register i of 4.
    """
    _active(warps, mask, None, "mma")
    count = warps.n // 32
    words = np.empty((6, warps.n), np.uint32)
    for i, register in enumerate(registers[:6]):
        words[i] = register
    halves = from_bf16(words.view(np.uint16)).astype(np.float64)
    a = halves[:4].reshape(2, 2, count, 8, 4, 2)  # [i // 2, i % 2, warp, g, q, e]
    A = a.transpose(2, 1, 3, 0, 4, 5).reshape(count, 16, 16)
    b = halves[4:].reshape(2, count, 8, 4, 2)  # [i, warp, g, q, e]
    B = b.transpose(1, 0, 3, 4, 2).reshape(count, 16, 8)
    product = np.matmul(A, B).reshape(count, 2, 8, 4, 2)  # [warp, i // 2, g, q, i % 2]
    sums = product.transpose(1, 4, 0, 2, 3).reshape(4, warps.n)
    return [(part + c).astype(np.float32) for part, c in zip(sums, registers[6:], strict=True)]


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def meaning(instruction: Instruction) -> Meaning | None:
    """Of an instruction of a warp."""
    name = instruction.op[0]
    if name == "mma" and ".".join(instruction.op) == MMA:
        return Meaning(_mma, ["u32"] * 6 + ["f32"], together=True)
    if name == "elect":
        return Meaning(_elect, ["u32"], together=True)
    if name == "activemask":
        return Meaning(lambda w, m: [_ballot(w.mask(m).reshape(-1, 32))], ["u32"], together=True)
    decoders = {
        "shfl": _shuffle,
        "vote": _vote,
        "match": _match,
        "redux": _reduce,
        "ldmatrix": _ldmatrix,
    }
    return decoders[name](instruction) if name in decoders else None
