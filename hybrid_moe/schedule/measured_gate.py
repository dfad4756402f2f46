"""The gate of drafts where only the ratio of steps is known beforehand, and their time is measured.

The timeline says how much longer a step of several tokens is than one of one; how long that is on a
machine, the first steps say. Until then nothing is drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from hybrid_moe.schedule.draft_gate import DraftGate

FIRST_MEASURED = 3
"""Steps without a draft before the first one with some: the middle one counts, for one of them may
have compiled something."""


class MeasuredGate:
    """A `DraftGate` from the first measured steps on. Not for several threads.

    Args:
        ratio: tokens in a step -> its time by that of a step of one token.
        draft_ratio: of drafting one token, by the same.
        max_draft: the longest draft.

    Attributes:
        max_draft: the longest draft.
        gate: None until enough has been measured.
    """

    def __init__(self, ratio: Callable[[int], float], draft_ratio: float, max_draft: int) -> None:
        self.max_draft = max_draft
        self.gate: DraftGate | None = None
        self._ratio, self._draft_ratio = ratio, draft_ratio
        self._first: list[float] = []

    @property
    def length(self) -> int:
        """Tokens to draft in the next step."""
        return 0 if self.gate is None else self.gate.length

    def note(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """Take in a step with its draft, see `DraftGate.note`."""
        if self.gate is not None:
            self.gate.note(drafted, accepted, seconds)
        elif not drafted and seconds is not None:
            self._first.append(seconds)
            if len(self._first) == FIRST_MEASURED:
                self.gate = self._gate(median(self._first))

    def _gate(self, plain: float) -> DraftGate:
        return DraftGate(
            lambda tokens: plain * self._ratio(tokens),
            plain * self._draft_ratio,
            self.max_draft,
        )
