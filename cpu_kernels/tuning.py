"""How work is cut into tasks: every heuristic with its reason, and what it gained on which machine.

Strips that follow each other in memory are a run. A run is read at the speed of memory; a jump to
the next one costs 1.5 us, in which one core reads 40 KB (Zen 4: runs of 70 KB are read at 17.8
GB/s, 279 KB at 24.6, 557 KB at 26.7, 1.1 MB at 27.7, of 28.8). So few tokens want long runs, and
as many workers as there are want even ones.
"""

from __future__ import annotations

TILE_TOKENS = 6
"""An expert with so many tokens on average waits for its weights more than it computes."""
RUN_STRIPS = 8
"""Strips of one expert from which on a longer run gains little: 0.5 to 1.1 MB in models of today.
Eight strips a worker are also even enough: one more for some is an eighth at most."""
FEW_TASKS = 4
MANY_TASKS = 12
"""Tasks for each worker, at most: whoever is put aside by the system delays the others by less than
one. With few tokens tasks are alike, and each costs a jump; with many an expert has more than
another, and a task has a copy of its inputs to make, as much work as a third of a strip."""
OUT_ROWS = 512
"""Rows of sums that a task of whole output rows works in at few tokens: 128 KB."""
OUT_STRIPS = 4
"""Strips of such a task at many tokens, at most."""
PAIR_TOKENS = 64
"""Tokens up to which the sums of each pair may be kept. Their float32 [H] are written and read
once: 1 to 2 % of the bytes of down, if each expert has one token."""
ENCODE_TOKENS = 16
"""Tokens of an encoding task, at most. 2 us each at 4096 inputs."""


def encode_tasks(tokens: int, workers: int) -> int:
    return min(tokens, max(workers, (tokens + ENCODE_TOKENS - 1) // ENCODE_TOKENS))


def expert_tasks(active: int, strips: int, pairs: int, workers: int) -> int:
    """Tasks over the strips of all active experts, each an even run of them."""
    if workers == 1 or active >= RUN_STRIPS * workers:
        return active if strips > 0 else 0
    most = FEW_TASKS if pairs <= TILE_TOKENS * active else MANY_TASKS
    each = max(1, min(most, active * strips // (RUN_STRIPS * workers)))
    return min(active * strips, each * workers)


def row_tasks(active: int, strips: int, pairs: int, tokens: int, workers: int) -> int:
    """Tasks over strips that have the rows of all experts: one expert's strips are a run."""
    each = 1 if pairs <= TILE_TOKENS * active else MANY_TASKS
    most = max(OUT_STRIPS, OUT_ROWS // tokens)
    return min(strips, max(each * workers, (strips + most - 1) // most))


def rows_by_pair(strips: int, workers: int) -> bool:
    """Whether few tokens keep the sums of each pair, so that a task of down need not have the rows
    of all experts: with fewer than eight strips a worker those runs are short and uneven."""
    return workers > 1 and RUN_STRIPS * workers > strips


def out_rows(strips: int, tokens: int) -> int:
    """Rows of sums of the largest task of `row_tasks`, or of `combine` for as many strips."""
    return min(strips * tokens, max(OUT_ROWS, OUT_STRIPS * tokens))
