"""The heuristics of the CPU kernels, with their reasons and, where measured, their gains.

Nothing here changes a bit of any output. Functions that drivers call are compiled with them, so
they keep to what `jit.translate` takes. Which order a kernel goes in follows from registers alone:
`kernels.order`.
"""

from __future__ import annotations

from hybrid_moe.formats.strips import LINE, StripLayout

# Tiles: the tokens of one expert that meet a strip together

TILE_TOKENS = 6
"""Tokens beyond which a larger tile gains nothing: a line of codes then meets 24 dot products. Zen
4: 112 GMAC/s from 3 tokens on, of 117. An expert with fewer on average waits for memory more than
it computes."""
STREAM_TOKENS = 4
"""Tokens up to which a kernel reads a strip from its first line to its last, since it waits for
them. Zen 4: lines touched in ascending order are read at full speed."""
BATCH_TOKENS = 192
"""Tokens of one expert that share a pass over its strips, so many that reading weights twice costs
nothing: with 48, BF16 loses 5 % on Zen 4. Sums of a pass are 48 KB, in the second-level cache."""


def unpack_from(most: int) -> int:
    """Tokens from which it pays to unpack a strip's codes first, with tiles of up to `most`.

    Unpacking a group of a panel costs as much as some tiles save by not decoding it. On AVX-512
    lookups share pipes with few other instructions (Zen 4: unpacking takes 27 cycles, a tile of six
    saves 5); with the small tiles of narrow registers they are a fifth of the work (Zen 3: two
    tiles are enough).
    """
    return 40 if most == TILE_TOKENS else 2 * most + 1


MXFP4_BLOCKS_FROM = TILE_TOKENS + 1
"""Tokens from which a matrix unit takes over (AMX, by counting cycles, not measured: the counts are
in docs/kernels.md). For a group of a strip T tokens take 32 cycles for decoding and 44 each
directly, in tiles of up to 6; a block takes 40 for unpacking and the more of 12 T (vectors) and 128
+ 4 T (stores), T in fours. By count it wins from 4 on, but none has run yet: it begins where the
direct way decodes twice (7 tokens: 372 against 200). So do all codes that are unpacked. With 8-bit
activations both ways take less, decoding aside: 32 and 24 each against 40 and the more of 8 T and
64 + 4 T; seven tokens take 232 and 136."""
INT8_BLOCKS_FROM = TILE_TOKENS + 1
"""Likewise, without decoding, of all codes that are bytes: T tokens take 17 cycles a panel
directly, 68 T in all, a block the more of 12 T and 128 + 4 T. By count it wins from 3 on; like
MXFP4, it begins where codes would be read twice."""
BF16_BLOCKS_FROM = 1
"""Likewise: 16 cycles for 1 KiB of weights are faster than any memory."""
E4M3_BLOCKS_FROM = 1
"""Likewise, and not by choice: the order in which a matrix unit adds is its own, and bits must not
depend on how many tokens there are. One token pays for unpacking, by count 60 cycles a panel for
512 bytes of codes beside 16 of products: 17 GB/s a core at 2.5 GHz, more than a core of a processor
with many reads when all do."""
BLOCK_TURN_TOKENS = 4
"""Tokens per iteration of the vector loops beside a matrix unit. One token at a time, those loops
would take longer than its products."""

# Chunks: groups of a strip that several tiles meet in turn, from the second-level cache

UNPACK_GROUPS = 32
"""Groups that are unpacked at a time: 80 KB, beside the inputs of a tile. Several strips in turn
for each chunk, so that inputs too come from the third-level cache once, gained nothing on Zen 4
(4096 x 2048, 96 tokens an expert, 8 strips: 104.3 GMAC/s, 104.7 without)."""
BF16_CHUNK_GROUPS = 32
"""128 KB."""


def chunk_groups(layout: StripLayout) -> int:
    """Groups of packed integer codes: 256 up to five bits (MXFP4: 272 KB, a quarter of Zen 4's
    second-level cache), 64 beyond (INT8: 136 KB). Whole blocks, which have 16 groups at most."""
    return 256 if layout.words + layout.high_words <= 5 else 64


TURN_GROUPS = 16
"""Groups that two panels take before the other two follow: 17 KB, half of a first-level cache."""

E4M3_WORDS = 2
"""Words of codes, of all panels that go together, in the body of a loop: 8 of a group's are 300 to
700 instructions a kernel, of which compiling takes three times as long and Zen 4 runs none faster.
"""

# Prefetch instructions

PACKED_AHEAD = 8192
"""Bytes between the codes that are read and the line that is prefetched, in kernels that do not
read lines in order. The others leave it to the processor: prefetch instructions cost them 20 to
25 % on Zen 4."""
BF16_BLOCK_AHEAD = 8192
"""Likewise, of BF16 in a matrix unit's one pass over a strip."""
INT8_BLOCK_AHEAD = 8192
"""Likewise, of INT8."""
BF16_AHEAD = 4096
"""Likewise for one token on narrow registers. Zen 3, whose prefetchers stop at the end of a 4 KiB
page, gains a sixth."""
SHARE_LINES = 2
"""Lines of the chunk that is unpacked next, which a tile prefetches in each group."""
SHARE_BYTES = SHARE_LINES * LINE * UNPACK_GROUPS
"""The same for a whole chunk. Unpacking stalls on memory unless the tiles before it have prefetched
its codes, 34 KB; nine tiles prefetch all of them."""

# Tasks. Strips that follow each other in memory are a run. A run is read at the speed of memory; a
# jump to the next one costs 1.5 us, in which one core reads 40 KB (Zen 4: runs of 70 KB are read at
# 17.8 GB/s, 279 KB at 24.6, 557 KB at 26.7, 1.1 MB at 27.7, of 28.8). So few tokens want long runs,
# and as many workers as there are want even ones.

RUN_STRIPS = 8
"""Strips of one expert from which on a longer run gains little: 0.5 to 1.1 MB in models of today.
Eight strips a worker are also even enough: one more for some is an eighth at most."""
FEW_TASKS = 4
MANY_TASKS = 12
"""Tasks for each worker, at most: a thread that the system puts aside delays the others by less
than one task. With few tokens tasks are alike, and each costs a jump. With many, experts have
different numbers of them, and each task copies its inputs, as much work as a third of a strip."""
STRIPS_AT_ONCE = 16
"""Strips that are read, at few tokens, before their sums are processed: anything between two strips
interrupts the stream (Zen 4: an activation takes 51 ns and costs 250). Zen 4, one token and
one thread: 2048 x 768 in 0.66 ms with 16 strips of down at once, 0.71 with one."""
OUT_ROWS = 512
"""Rows of sums that a task of whole output rows works in at few tokens: 128 KB."""
OUT_STRIPS = 4
"""Strips of such a task at many tokens, at most."""
PAIR_TOKENS = 64
"""Tokens up to which the sums of each pair may be kept. Their float32 [H] are written and read
once: 1 to 2 % of the bytes of down, if each expert has one token."""
ENCODE_TOKENS = 16
"""Tokens of an encoding task, at most. Zen 4: 2 us each at 4096 inputs."""
INLINE_ENCODE_TOKENS = 4
"""Tokens up to which the submitting thread encodes them: a phase costs as much."""
MAX_TOKENS_PER_JOB = 2048
"""Larger batches run part by part in the memory of one job: scratch grows with tokens x k, and 2048
tokens already amortise unpacking."""


def encode_tasks(tokens: int, workers: int) -> int:
    """Tasks that encode inputs."""
    return min(tokens, max(workers, (tokens + ENCODE_TOKENS - 1) // ENCODE_TOKENS))


def expert_tasks(active: int, strips: int, pairs: int, workers: int) -> int:
    """Tasks over the strips of all active experts, each an even run of them.

    With one worker, or many experts for each, a task is an expert. Otherwise every worker gets the
    same number of tasks, each of eight strips or more if there are enough.
    """
    if workers == 1 or active >= RUN_STRIPS * workers:
        return active if strips > 0 else 0
    most = FEW_TASKS if pairs <= TILE_TOKENS * active else MANY_TASKS
    each = max(1, min(most, active * strips // (RUN_STRIPS * workers)))
    return min(active * strips, each * workers)


def row_tasks(active: int, strips: int, pairs: int, tokens: int, workers: int) -> int:
    """Tasks over strips that have the rows of all experts: one expert's strips are a run.

    All are alike. At few tokens there is one for each worker, as far as its sums have room.
    """
    each = 1 if pairs <= TILE_TOKENS * active else MANY_TASKS
    most = max(OUT_STRIPS, OUT_ROWS // tokens)
    return min(strips, max(each * workers, (strips + most - 1) // most))


def out_rows(strips: int, tokens: int) -> int:
    """Rows of sums of the largest task of `row_tasks`."""
    return min(strips * tokens, max(OUT_ROWS, OUT_STRIPS * tokens))


def rows_by_pair(strips: int, workers: int) -> bool:
    """Whether few tokens keep the sums of each pair, so that a task of down need not have the rows
    of all experts: with fewer than eight strips a worker those runs are short and uneven. By
    counting: 4096 x 2048, 64 strips, 6 experts, 96 workers: the busiest read 1.5 times the mean."""
    return workers > 1 and RUN_STRIPS * workers > strips


# Waiting

PAUSES_PER_LOOK = 32
"""Between two looks at the clock: a pause takes 1 to 140 cycles."""
SPIN_NS = 50_000
"""Of an idle worker: torch's own threads want the cores when we are idle."""
AWAKE_SPIN_NS = 5_000_000
"""Of an idle worker in a decode step, in which torch has one thread: longer than what lies between
two jobs. gpt-oss-20b, Zen 4: with 50 us it falls asleep in most gaps of a decode step, which takes
109 to 122 ms then and 101 now."""
WAIT_SPIN_NS = 200_000
"""For a phase or a job: as long as the tasks of a decode step that are left."""

# Attention: splits of the keys of one sequence and key head


def attention_tasks(units: int, workers: int) -> int:
    """Tasks of so many splits: several for each worker, since the system may put one aside; a
    split takes some microseconds, a claim a tenth of one."""
    return min(units, 8 * workers)
