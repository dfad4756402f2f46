"""Strings that end an answer, found in the text as it comes."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first of some strings, which is left out, as OpenAI's API has it.

    A piece that may be the beginning of one is held back until it is clear.

    Attributes:
        found: one of them has come; nothing is passed on any more.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What can be passed on now that `text` has come."""
        if self.found:
            return ""
        whole = self._held + text
        places = [place for s in self._strings if (place := whole.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            return whole[: min(places)]
        keep = max((_overlap(whole, s) for s in self._strings), default=0)
        passed, self._held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        return passed

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that `string` begins with; not all of it."""
    return next((n for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n])), 0)
