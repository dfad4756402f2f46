"""The tasks of an attention job: partial results of splits of the keys, then their merge.

A unit is a split of at most ATTENTION_SPLIT keys of one sequence and key head, for all query rows
that share them: query heads of the group, for each query token. Its partials are merged in a phase
of their own, or at once where every sequence is a single split.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver
from hybrid_moe.cpu_kernels.drivers.records import ATTENTION_SPLIT, Attention, Job
from hybrid_moe.cpu_kernels.drivers.tiling import ceil_div, part
from hybrid_moe.cpu_kernels.jit.record import i32


@driver
def first_key(attention: Attention, sequence: int, query: int) -> int:
    """The first key that a query token of a sequence sees."""
    first = 0
    if attention.first.address != 0:
        first = attention.first[sequence]
    if attention.window != 0:
        first = max(first, attention.keys - attention.queries + 1 + query - attention.window)
    return max(0, first)


@driver
def split_count(attention: Attention, sequence: int) -> int:
    """Splits of a sequence: the earliest query token sees the most."""
    return ceil_div(max(0, attention.keys - first_key(attention, sequence, 0)), ATTENTION_SPLIT)


@driver
def heads(attention: Attention) -> int:
    """Key heads of all sequences."""
    return attention.sequences * attention.key_heads


@driver
def attend_units(attention: Attention) -> int:
    return heads(attention) * attention.splits


@driver
def merge_units(attention: Attention) -> int:
    return heads(attention) * attention.rows


@driver
def unit_macs(attention: Attention) -> int:
    return ATTENTION_SPLIT * attention.rows * (attention.key_dim + attention.value_dim)


@driver
def head_offset(attention: Attention, head: int, sequence_bytes: int, head_bytes: int) -> int:
    """Bytes in front of a key head of all sequences."""
    sequence = head // attention.key_heads
    return sequence * sequence_bytes + (head - sequence * attention.key_heads) * head_bytes


@driver
def key_address(attention: Attention, head: int, key: int) -> int:
    of_head = head_offset(attention, head, attention.key_sequence_bytes, attention.key_head_bytes)
    return attention.key_states + of_head + key * attention.key_bytes


@driver
def value_address(attention: Attention, head: int, key: int) -> int:
    of_head = head_offset(
        attention, head, attention.value_sequence_bytes, attention.value_head_bytes
    )
    return attention.value_states + of_head + key * attention.value_bytes


@driver
def partial_address(attention: Attention, head: int, split: int, row: int) -> int:
    """Partials are [head][split][row]."""
    at = (head * attention.splits + split) * attention.rows + row
    return attention.partials + at * attention.partial_bytes


@driver
def merge_row(attention: Attention, head: int, row: int) -> None:
    """The output of one query row."""
    sequence = head // attention.key_heads
    group = attention.rows // attention.queries
    query_head = (head - sequence * attention.key_heads) * group + row // attention.queries
    token = sequence * attention.queries + row % attention.queries
    at = token * attention.key_heads * group + query_head
    call(
        attention.merge,
        partial_address(attention, head, 0, row),
        attention.rows * attention.partial_bytes,
        split_count(attention, sequence),
        attention.value_dim,
        attention.sinks + attention.sink_bytes * query_head,
        attention.sink_bytes,
        attention.out + 2 * attention.value_dim * at,
    )


@driver
def attend_unit(attention: Attention, head: int, split: int, scratch: int) -> None:
    """The partials of one split, if the sequence has so many."""
    sequence = head // attention.key_heads
    first = first_key(attention, sequence, 0) + split * ATTENTION_SPLIT
    count = min(ATTENTION_SPLIT, attention.keys - first)
    if count <= 0:
        return
    queries = attention.queries
    rows = attention.rows
    visible = i32.at(scratch)
    for row in range(rows):
        query = row % queries
        visible[2 * row] = first_key(attention, sequence, query) - first
        visible[2 * row + 1] = attention.keys - queries + 1 + query - first
    ahead = key_address(attention, head, first + count)
    if first + count == attention.keys:
        ahead = key_address(attention, head + 1, 0)
    call(
        attention.attend,
        attention.query_states + 2 * attention.key_dim * rows * head,
        key_address(attention, head, first),
        attention.key_bytes,
        value_address(attention, head, first),
        attention.value_bytes,
        count,
        ahead,
        scratch,
        rows,
        attention.key_dim,
        attention.value_dim,
        attention.scale,
        scratch + attention.visible_bytes,
        partial_address(attention, head, split, 0),
    )


@driver
def attend_task(job: Job, pool: int, begin: int, end: int, scratch: int) -> None:
    """Units begin..end-1 of a pool: splits of each head, one head behind the other."""
    attention = job.attention
    first = part(attend_units(attention), job.pools, pool)
    for unit in range(first + begin, first + end):
        head = unit // attention.splits
        attend_unit(attention, head, unit - head * attention.splits, scratch)
        if attention.splits == 1:
            for row in range(attention.rows):
                merge_row(attention, head, row)


@driver
def merge_task(job: Job, pool: int, begin: int, end: int) -> None:
    """Rows begin..end-1 of a pool."""
    attention = job.attention
    first = part(merge_units(attention), job.pools, pool)
    for unit in range(first + begin, first + end):
        head = unit // attention.rows
        merge_row(attention, head, unit - head * attention.rows)
