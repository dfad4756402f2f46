"""Attention of a few query rows over cached keys and values: one pass over both.

The rows of a unit share keys and values: query heads of one group, for each query token. A unit is
a split, up to ATTENTION_SPLIT keys of one sequence and key head, so few that its scores stay in the
first-level cache. `attend` leaves a *partial* for each row, and `merge` combines those of a row:

    m = max of the scores,  p = exp(score - m) rounded to bf16,  l = sum p,  acc = sum p * value
    out = sum_splits acc * exp(m_s - m) / (sum_splits l * exp(m_s - m) + exp(sink - m))

Scores are float32 sums of bf16 products (`pair_dot`, dimensions in ascending pairs), and so is acc
over pairs of keys. The weights that are summed in l are the rounded ones, so they add up to one.
Splits begin at a sequence's first visible key, so the bits of a row depend neither on threads nor
on other rows.

    partial = [acc float32 [value_dim] | m, l float32 | padding to a cache line]

acc lies in blocks of 32 dimensions as the interleaving of two rows of values leaves them, see
`_interleave`; a block of 16 at the end is in order. Nothing outside of the unit's keys is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.drivers.records import ATTENTION_SPLIT
from hybrid_moe.cpu_kernels.dsl.emit import F32, I16, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.kernels.encode import to_bf16
from hybrid_moe.cpu_kernels.kernels.epilogue import exp
from hybrid_moe.cpu_kernels.kernels.transpose import lanes128, transpose
from hybrid_moe.formats.strips import LINE

KEYS = 16
"""Keys of a block of scores, one a lane."""
TURN = 32
"""Keys whose values all dimensions meet before the next: 4 KB of 64 dimensions, in the first-level
cache for the second block of dimensions."""
SECOND_LEVEL = 2
"""How near to fetch: 32 KB of values would drive keys and scores out of the first-level cache."""
DIMS = 16
"""Dimensions are a multiple of this."""

_SCORE_ROW = 4 * ATTENTION_SPLIT
_WEIGHT_ROW = 2 * ATTENTION_SPLIT
_MINUS_INFINITY = 0xFF800000 - (1 << 32)


def partial_bytes(value_dim: int) -> int:
    """Bytes of a partial."""
    return 4 * value_dim + LINE


def scratch_bytes(rows: int, key_dim: int) -> int:
    """Bytes that `attend` works in: a block of keys as pairs, scores, weights."""
    return 2 * KEYS * key_dim + rows * (_SCORE_ROW + _WEIGHT_ROW)


def row_blocks(tier: Tier) -> tuple[Sequence[int], Sequence[int]]:
    """Rows whose scores, and whose sums of values, are accumulated in registers at a time: largest
    first, powers of two. A row takes one panel of 16 lanes, or two for 32 dimensions of values."""
    panels = tier.registers // tier.registers_per_panel
    return _powers(min(8, panels // 2)), _powers(min(8, panels // 4))


def _powers(most: int) -> Sequence[int]:
    return [1 << i for i in reversed(range(most.bit_length()))]


def _infinity(emit: Emit, lanes: int = 1) -> Val:
    """-infinity in every lane."""
    return emit.splat(_MINUS_INFINITY, I32, lanes).bits(F32)


def _reduce(emit: Emit, value: Val, combine: Callable[[Val, Val], Val]) -> Val:
    """All lanes combined, by halves."""
    while value.lanes > 2:
        value = combine(*value.halves())
    return combine(*(_lane(emit, value, i) for i in range(2)))


def _lane(emit: Emit, value: Val, index: int) -> Val:
    return Val(emit, emit.builder.extract_element(value.ir, emit.splat(index, I32).ir))


def _greater(a: Val, b: Val) -> Val:
    return (a > b).select(a, b)


def _in_blocks(emit: Emit, rows: Val, sizes: Sequence[int]) -> Iterator[tuple[Val, int]]:
    """(first row, number) of blocks that cover the rows, largest first: code for each size."""
    done = emit.i64(0)
    for size in sizes:
        end = done + (((rows - done) >> (size.bit_length() - 1)) << (size.bit_length() - 1))
        with emit.loop(done, end, size) as row:
            yield row, size
        done = end


@dataclass(frozen=True)
class _Rows:
    """Rows in memory, the last of which is read in place of those behind it."""

    emit: Emit
    address: Val
    stride: Val
    count: Val

    def at(self, index: Val) -> Val:
        """Address of a row."""
        last = self.count - 1
        return self.address + (index > last).select(last, index) * self.stride


def _fetch(emit: Emit, rows: Val, stride: Val, count: int, at: Val) -> None:
    """Fetch the line at byte `at` of so many rows into the second-level cache."""
    for i in range(count):
        emit.prefetch(rows + stride * i + at, SECOND_LEVEL)


def _load_pairs(
    emit: Emit, keys: _Rows, values: _Rows, first: Val, key_dim: Val, pairs: Val
) -> None:
    """16 keys from `first` on -> pairs, int32 [key_dim / 2][16 keys]: two dimensions of a key in
    each lane. Fetches their values."""
    rows = [keys.at(first + i) for i in range(KEYS)]
    whole = (key_dim >> 5) << 5
    with emit.loop(0, whole, 32) as dim:
        _fetch(emit, values.address + first * values.stride, values.stride, KEYS, dim * 2)
        for i, column in enumerate(transpose([emit.load(row + dim * 2, I32, 16) for row in rows])):
            emit.store(pairs + dim * 32 + 64 * i, column, align=64)
    with emit.when(key_dim > whole):
        halves = [emit.load(row + whole * 2, I32, 8) for row in rows]
        for i, column in enumerate(transpose([half.concat(half) for half in halves])[:8]):
            emit.store(pairs + whole * 32 + 64 * i, column, align=64)


def _score_block(
    emit: Emit, q: Val, pairs: Val, key_dim: Val, scale: Val, scores: Val, row: Val, size: int
) -> None:
    """Scores of `size` rows from `row` on with 16 keys."""
    row_bytes = key_dim * 2
    at = q + row * row_bytes
    sums = [emit.var(emit.splat(0.0, F32, KEYS)) for _ in range(size)]
    with emit.loop(0, key_dim >> 1) as pair:
        key = emit.load(pairs + pair * 64, I32, KEYS, align=64)
        for i, total in enumerate(sums):
            x = emit.load(at + row_bytes * i + pair * 4, I32)
            total.set(emit.op("pair_dot", total.get(), key, x))
    for i, total in enumerate(sums):
        to = scores + (row + i) * _SCORE_ROW
        emit.store(to, total.get() * scale, align=64)


def _weigh_row(
    emit: Emit, scores: Val, weights: Val, blocks: Val, visible: Val, partial: Val
) -> None:
    """Scores of a row -> weights, bf16 [blocks][16]; m and l -> partial. `visible` is int32 [2]:
    the first visible key of the unit, and the one past the last."""
    lane = emit.constant(range(KEYS), I32)
    low, high = (emit.load(visible + 4 * i, I32, align=4) for i in range(2))

    def seen(block: Val) -> Val:
        index = lane + (block * KEYS).trunc(I32)
        before = (index < low).select(emit.splat(0, I32, KEYS), (index < high).zext(I32))
        return before.equals(1)

    most = emit.var(_infinity(emit, KEYS))
    with emit.loop(0, blocks) as block:
        at = scores + block * (4 * KEYS)
        score = seen(block).select(emit.load(at, F32, KEYS, align=64), _infinity(emit, KEYS))
        emit.store(at, score, align=64)
        most.set(_greater(score, most.get()))
    m = _reduce(emit, most.get(), _greater)
    reference = m.equals(_infinity(emit)).select(0.0, m)
    total = emit.var(emit.splat(0.0, F32, KEYS))
    with emit.loop(0, blocks) as block:
        score = emit.load(scores + block * (4 * KEYS), F32, KEYS, align=64)
        p = score.equals(_infinity(emit, KEYS)).select(0.0, exp(score - reference))
        rounded = to_bf16(p)
        emit.store(weights + block * (2 * KEYS), rounded, align=32)
        total.set(total.get() + (rounded.zext(I32) << 16).bits(F32))
    emit.store(partial, m, align=4)
    emit.store(partial + 4, _reduce(emit, total.get(), lambda a, b: a + b), align=4)


def _interleave(emit: Emit, even: Val, odd: Val, lanes: int) -> list[Val]:
    """Two rows of bf16 as pairs: of 32 dimensions within 128 bits, where one instruction does it,
    so that block 4q + i of the result holds dimensions 8q + i and 8q + 4 + i; of 16 in order."""
    if lanes == 16:
        return [even.zext(I32) | (odd.zext(I32) << 16)]
    return [
        even.shuffle(
            [8 * q + 4 * h + i + 32 * o for q in range(4) for i in range(4) for o in range(2)], odd
        ).bits(I32)
        for h in range(2)
    ]


def in_order(emit: Emit, low: Val, high: Val) -> list[Val]:
    """The 32 dimensions of two accumulators of `_interleave` in order."""
    return [lanes128(low, high, lanes) for lanes in ((0, 4, 1, 5), (2, 6, 3, 7))]


def _add_values(
    emit: Emit, values: _Rows, weights: Val, first: Val, pairs: Val, at: Val, to: Val, stride: Val,
    size: int, lanes: int,
) -> None:  # fmt: skip
    """acc of `size` rows (at `to`, `stride` bytes apart) += weights * values, of `lanes` dimensions
    at byte `at` of the rows of values and `pairs` pairs of keys from `first` on."""
    blocks = lanes // 16
    places = [(i, b) for i in range(size) for b in range(blocks)]
    sums = {
        (i, b): emit.var(emit.load(to + stride * i + 64 * b, F32, 16, align=64)) for i, b in places
    }
    with emit.loop(0, pairs) as pair:
        key = first + pair * 2
        even, odd = (emit.load(values.at(key + i) + at, I16, lanes) for i in range(2))
        value = _interleave(emit, even, odd, lanes)
        for i in range(size):
            x = emit.load(weights + _WEIGHT_ROW * i + key * 2, I32)
            for b in range(blocks):
                total = sums[i, b]
                total.set(emit.op("pair_dot", total.get(), value[b], x))
    for (i, b), total in sums.items():
        emit.store(to + stride * i + 64 * b, total.get(), align=64)


def attend(tier: Tier) -> KernelBody:
    """Kernel (q, keys, key_stride, values, value_stride, count, ahead, visible, rows, key_dim,
    value_dim, scale, scratch, partials): one unit, see the module.

    q is bf16 [rows][key_dim]. keys and values are bf16 [count], of key_dim and value_dim each
    (multiples of 16), so many bytes apart; 1 <= count <= ATTENTION_SPLIT. visible is int32
    [rows][2]: the keys that a row sees, from the first up to and without the second. scale is the
    address of a float32. scratch has `scratch_bytes(rows, key_dim)`, partials are [rows].

    Memory is busy all the time: values are fetched while scores are computed, and while values are
    added, the keys at `ahead`, which the next unit reads (any address: nothing there is used).
    """
    for_scores, for_values = row_blocks(tier)

    def body(
        emit: Emit, q: Val, keys: Val, key_stride: Val, values: Val, value_stride: Val, count: Val,
        ahead: Val, visible: Val, rows: Val, key_dim: Val, value_dim: Val, scale: Val,
        scratch: Val, partials: Val,
    ) -> None:  # fmt: skip
        factor = emit.load(scale, F32, align=4)
        scores = scratch + key_dim * (2 * KEYS)
        weights = scores + rows * _SCORE_ROW
        row_bytes = value_dim * 4 + LINE
        blocks = (count + (KEYS - 1)) >> 4
        of_keys = _Rows(emit, keys, key_stride, count)
        of_values = _Rows(emit, values, value_stride, count)
        with emit.loop(0, blocks) as block:
            _load_pairs(emit, of_keys, of_values, block * KEYS, key_dim, scratch)
            for row, size in _in_blocks(emit, rows, for_scores):
                to = scores + block * (4 * KEYS)
                _score_block(emit, q, scratch, key_dim, factor, to, row, size)
        with emit.loop(0, rows) as row:
            partial = partials + row * row_bytes
            _weigh_row(
                emit, scores + row * _SCORE_ROW, weights + row * _WEIGHT_ROW, blocks,
                visible + row * 8, partial + value_dim * 4,
            )  # fmt: skip
            with emit.loop(0, value_dim >> 4) as i:
                emit.store(partial + i * 64, emit.splat(0.0, F32, 16), align=64)
        whole = (value_dim >> 5) << 5
        with emit.loop(0, count, TURN) as first:
            left = count - first
            pairs = ((left > TURN).select(TURN, left) + 1) >> 1

            def add(dim: Val, lanes: int) -> None:
                for row, size in _in_blocks(emit, rows, for_values):
                    _add_values(
                        emit, of_values, weights + row * _WEIGHT_ROW, first, pairs, dim * 2,
                        partials + row * row_bytes + dim * 4, row_bytes, size, lanes,
                    )  # fmt: skip

            with emit.loop(0, whole, 32) as dim:
                _fetch(emit, ahead + first * key_stride, key_stride, TURN, dim * 2)
                add(dim, 32)
            with emit.when(value_dim > whole):
                add(whole, 16)

    return body


ATTEND_ARITY = 14


def merge(
    emit: Emit,
    partials: Val,
    stride: Val,
    splits: Val,
    value_dim: Val,
    sink: Val,
    sink_bytes: Val,
    out: Val,
) -> None:
    """Kernel: the partials of one row, `stride` bytes apart, -> out, bf16 [value_dim]; 0 where it
    saw no key. `sink` is the address of a bf16 or a float32, by its `sink_bytes`; 0: there is none.
    Overwrites each m."""
    minus_infinity = _infinity(emit)
    tail = value_dim * 4
    most = emit.var(minus_infinity)
    with emit.when(sink_bytes.equals(2)):
        most.set((emit.load(sink, I16, align=2).zext(I32) << 16).bits(F32))
    with emit.when(sink_bytes.equals(4)):
        most.set(emit.load(sink, F32, align=4))
    sunk = most.get()
    with emit.loop(0, splits) as i:
        most.set(_greater(emit.load(partials + i * stride + tail, F32, align=4), most.get()))
    reference = most.get().equals(minus_infinity).select(0.0, most.get())

    def weight(m: Val) -> Val:
        return m.equals(minus_infinity).select(0.0, exp(m - reference))

    total = emit.var(weight(sunk))
    with emit.loop(0, splits) as i:
        at = partials + i * stride + tail
        share = weight(emit.load(at, F32, align=4))
        emit.store(at, share, align=4)
        total.set(total.get() + emit.load(at + 4, F32, align=4) * share)
    divisor = emit.broadcast(total.get().equals(0.0).select(1.0, total.get()), 16)

    def combined(dim: Val, blocks: int) -> list[Val]:
        sums = [emit.var(emit.splat(0.0, F32, 16)) for _ in range(blocks)]
        with emit.loop(0, splits) as i:
            at = partials + i * stride
            share = emit.load(at + tail, F32, align=4)
            for b, sum_ in enumerate(sums):
                part = emit.load(at + dim * 4 + 64 * b, F32, 16, align=64)
                sum_.set(sum_.get() + part * share)
        return [sum_.get() / divisor for sum_ in sums]

    whole = (value_dim >> 5) << 5
    with emit.loop(0, whole, 32) as dim:
        for half, y in enumerate(in_order(emit, *combined(dim, 2))):
            emit.store(out + dim * 2 + 32 * half, to_bf16(y), align=2)
    with emit.when(value_dim > whole):
        emit.store(out + whole * 2, to_bf16(combined(whole, 1)[0]), align=2)


MERGE_ARITY = 7
