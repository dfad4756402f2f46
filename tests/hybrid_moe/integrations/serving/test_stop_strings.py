"""Stop strings, however the text is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.integrations.transformers.serving.stop_strings import StopStrings

TEXT = st.text("ab ", max_size=8)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_in_front_of_the_first(pieces: list[str], strings: list[str]) -> None:
    """Nothing that is passed on is taken back."""
    text = "".join(pieces)
    stop = StopStrings(strings)
    passed = "".join(stop.feed(piece) for piece in pieces)
    assert text.startswith(passed)
    assert stop.found == any(s in text for s in strings)
    if stop.found:
        assert not any(s in passed for s in strings) and stop.rest() == ""
        assert text[len(passed) :].startswith(tuple(strings))
    else:
        assert passed + stop.rest() == text


def test_only_what_may_begin_a_stop_string_waits() -> None:
    stop = StopStrings(["\n\nQ:"])
    assert [stop.feed(c) for c in "a\n\nb\n\nQ:x"] == ["a", "", "", "\n\nb", "", "", "", "", ""]
    assert stop.found
