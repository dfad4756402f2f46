"""What speculative decoding asks of its drafts on a machine: how often they must be right to pay,
and how long they should be.

With experts on the CPU a step of several tokens meets more experts and takes longer. The draft's
own time is not counted: it is the engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_moe.planning.batch_step import step_seconds
from hybrid_moe.planning.plan import Plan
from hybrid_moe.schedule.draft_gate import FIRST_GUESS

ALGORITHM = "--speculative-algorithm"
CHECKED = "--speculative-num-draft-tokens"
DEPTH, WIDTH = "--speculative-num-steps", "--speculative-eagle-topk"
"""SGLang's flags: what drafts; tokens that a step checks, the one that is certain included; tokens
of the longest path of a draft, which may be a tree; and how many ways each of its nodes goes on."""

CHAINS = frozenset({"EAGLE", "EAGLE3", "NEXTN", "STANDALONE"})
"""Algorithms that draft token by token, so that a draft may have any length."""

LONGEST = 8
"""Tokens of a draft that `best_depth` tries."""


@dataclass(frozen=True)
class DraftFlags:
    """What flags for SGLang say about drafts; None for what they do not say."""

    algorithm: str | None = None
    checked: int | None = None
    depth: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, extra: Sequence[str]) -> DraftFlags:
        """Read them; the last of several counts, as for SGLang."""
        words = [part for word in extra for part in word.split("=", 1)]
        found = dict(itertools.pairwise(words))

        def number(flag: str) -> int | None:
            text = found.get(flag, "")
            return int(text) if text.isdecimal() else None

        algorithm = found.get(ALGORITHM)
        return cls(
            None if algorithm is None else algorithm.upper(),
            number(CHECKED),
            number(DEPTH),
            number(WIDTH),
        )

    @property
    def longest(self) -> int:
        """Tokens that a step adds at most beside the certain one."""
        checked = (self.checked or 1) - 1
        return checked if self.depth is None else min(self.depth, checked)


def expected_tokens(chance: float, drafted: int) -> float:
    """Of a step with so many drafted tokens, each right with `chance` where those before it are."""
    return sum(chance**n for n in range(drafted + 1))


def slowdown(plan: Plan, checked: int) -> float:
    """Time of a step that checks so many tokens of one request, over that of a step of one."""
    return step_seconds(plan, checked) / step_seconds(plan, 1)


def break_even(plan: Plan, checked: int, longest: int) -> float | None:
    """How often a drafted token must be right, those before it being right, so that steps that
    check so many tokens pay. None where they do not if all are: of a tree only one path is taken.
    """
    slower = slowdown(plan, checked)
    if slower > 1 + longest:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if expected_tokens(middle, longest) >= slower else (middle, high)
    return high


def best_depth(plan: Plan, chance: float = FIRST_GUESS) -> int:
    """Tokens of a draft, one at least, with which one request gets the most tokens a second."""

    def speed(drafted: int) -> float:
        return expected_tokens(chance, drafted) / step_seconds(plan, 1 + drafted)

    return max(range(1, LONGEST + 1), key=speed)


def draft_flags(plan: Plan, extra: Sequence[str]) -> list[str]:
    """SGLang's flags for the length of drafts, where `extra` asks for drafts and says nothing of
    their length. SGLang takes all three or none."""
    flags = DraftFlags.of(extra)
    given = (flags.checked, flags.depth, flags.width)
    if flags.algorithm not in CHAINS or any(value is not None for value in given):
        return []
    depth = best_depth(plan)
    return [DEPTH, str(depth), WIDTH, "1", CHECKED, str(1 + depth)]


def draft_notes(plan: Plan, extra: Sequence[str]) -> list[str]:
    """Notes where flags for SGLang ask for drafts, and say how long, or leave that to us."""
    chosen = draft_flags(plan, extra)
    flags = DraftFlags.of([*extra, *chosen])
    if flags.checked is None or flags.longest < 1:
        return []
    notes = []
    if chosen:
        notes.append(
            f"drafts of {flags.longest} tokens are the best if {FIRST_GUESS:.0%} of them are right;"
            f" {DEPTH}, {WIDTH} and {CHECKED} say otherwise"
        )
    slower = slowdown(plan, flags.checked)
    needed = break_even(plan, flags.checked, flags.longest)
    step = (
        f"a step of {flags.checked} tokens meets more experts and takes {slower:.1f} x as long as "
        "one of 1"
    )
    if needed is None:
        notes.append(
            f"{step}, and adds {1 + flags.longest} tokens at most: these drafts never pay, leave "
            f"{ALGORITHM} out or check fewer"
        )
    else:
        notes.append(f"{step}: drafts pay if they are right {needed:.0%} of the time")
    return notes
