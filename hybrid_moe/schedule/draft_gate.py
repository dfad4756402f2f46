"""How many tokens a draft proposes, so that speculation does not lose.

With experts on the CPU, every further token of a step meets further experts: a step of 1 + n
tokens takes longer than one of 1. With acceptance a (of each drafted token, where those before it
were accepted), a step yields (1 - a^(n + 1)) / (1 - a) tokens on average (Leviathan et al., 2023).
The gate takes the n with the most tokens per second, n = 0 among them.

What is estimated may be wrong, so there is an account. Each step without a draft pays in `BUDGET`
of its time; each step with one pays in what it saved, or takes out what it lost. A draft that could
lose more than there is does not happen. So all steps together take no more than 1 + `BUDGET` times
what they would have taken without drafts, and `FIRST_STEPS`, however acceptance turns out: as far
as a step takes what steps of its length have taken. From the same account one token is drafted now
and then where drafts look useless, to see whether they still are; and where every step drafts, one
now and then does not, to see what they save.

What is predicted counts as one measurement, and every measured step as another, until the average
has `DECAY` of the last one. Lengths that have not been tried keep their ratio to the one that was.
"""

from __future__ import annotations

from collections.abc import Callable

BUDGET = 0.01
"""Of the time, at most, that drafts may lose."""

MOST_SAVED = 16
"""Steps without a draft whose time the account holds at most: what was gained in an easy text is
not all lost in the next one."""

FIRST_STEPS = 4
"""As many are on the account in the beginning, so that drafts are tried at once."""

PROBE_AFTER = 32
"""Steps without a draft, until one is tried although it looks useless."""

PLAIN_AFTER = 64
"""Steps with a draft, until one has none although they pay."""

DECAY = 0.05
"""Of acceptance and of measured times, for each step; of the first measurements more."""

FIRST_GUESS = 0.7
"""Of acceptance, before any draft was checked."""


class DraftGate:
    """Chooses the draft length of each step. Not for several threads.

    Attributes:
        acceptance: estimated; of a drafted token, where those before it were accepted.
        balance: seconds on the account.
    """

    def __init__(
        self, step_seconds: Callable[[int], float], draft_seconds: float, max_draft: int
    ) -> None:
        """
        Args:
            step_seconds: tokens in a step -> its seconds by the timeline; asked once for each.
            draft_seconds: of drafting one token.
            max_draft: the longest draft.

        Raises:
            ValueError: negative lengths or times.
        """
        if max_draft < 0 or draft_seconds < 0:
            raise ValueError(
                f"max_draft is {max_draft}, draft_seconds {draft_seconds}: neither may be below 0"
            )
        self._seconds = [step_seconds(1 + n) + n * draft_seconds for n in range(max_draft + 1)]
        if min(self._seconds) <= 0:
            raise ValueError(f"a step takes {min(self._seconds)} s, must be above 0")
        self.acceptance = FIRST_GUESS
        self.balance = FIRST_STEPS * self._seconds[0]
        self._measured = [0] * (max_draft + 1)
        self._with = self._without = 0

    @property
    def max_draft(self) -> int:
        """The longest draft."""
        return len(self._seconds) - 1

    def seconds(self, length: int) -> float:
        """Of a step with so many drafted tokens: predicted, then measured."""
        return self._seconds[length]

    def tokens(self, length: int) -> float:
        """Expected of such a step."""
        return sum(self.acceptance**n for n in range(length + 1))

    @property
    def length(self) -> int:
        """Tokens to draft in the next step."""
        if self._with >= PLAIN_AFTER:
            return 0
        best = self._best()
        while best and self._could_lose(best) > self.balance:
            best -= 1
        return best

    def _best(self) -> int:
        """The most tokens per second; where that is none, 1 now and then."""
        best, speed, tokens, chance = 0, 0.0, 0.0, 1.0
        for n, seconds in enumerate(self._seconds):
            tokens, chance = tokens + chance, chance * self.acceptance
            if tokens / seconds > speed:
                best, speed = n, tokens / seconds
        probes = self._without >= PROBE_AFTER and self.max_draft > 0
        return 1 if not best and probes else best

    def _could_lose(self, length: int) -> float:
        """Seconds, if nothing is accepted."""
        return self._seconds[length] - self._seconds[0]

    def note(self, drafted: int, accepted: int, seconds: float | None = None) -> None:
        """Take in a step.

        Args:
            drafted: tokens that its draft was asked for. Those that did not come count as wrong.
            accepted: how many of these were right.
            seconds: of the step with its draft, if it was measured.

        Raises:
            ValueError: more accepted than drafted, or a draft longer than `max_draft`.
        """
        if not 0 <= accepted <= drafted < len(self._seconds):
            raise ValueError(
                f"{accepted} of {drafted} drafted tokens were accepted: must be 0 to {drafted}, "
                f"and a draft has at most {self.max_draft}"
            )
        plain = self._seconds[0]
        took = self._seconds[drafted] if seconds is None else seconds
        self.balance += BUDGET * plain if not drafted else plain * (1 + accepted) - took
        self.balance = min(self.balance, MOST_SAVED * plain)
        self._with, self._without = (self._with + 1, 0) if drafted else (0, self._without + 1)
        if seconds is not None:
            self._measure(drafted, seconds)
        for place in range(min(accepted + 1, drafted)):
            self.acceptance += DECAY * ((place < accepted) - self.acceptance)

    def _measure(self, length: int, seconds: float) -> None:
        """Take in what a step took."""
        before, weight = self._seconds[length], max(DECAY, 1 / (2 + self._measured[length]))
        self._seconds[length] += weight * (seconds - before)
        self._measured[length] += 1
        for other, times in enumerate(self._measured):
            if not times and other:
                self._seconds[other] *= self._seconds[length] / before
