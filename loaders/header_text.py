"""The text of a safetensors header: JSON of a fixed form, walked entry by entry.

`json.loads` would build whatever the text holds, up to 25 times its size, before anything could be
checked. Here only one short entry at a time becomes objects, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from json import JSONDecodeError, JSONDecoder
from typing import Any, NoReturn

from hybrid_moe.loaders.regular import MAX_KEY_LENGTH, is_utf8, shortened

MAX_ENTRY_LENGTH = 4096
"""Characters of one tensor's entry; a usual one has about 80."""

_METADATA = "__metadata__"
_MAX_DIGITS = 20  # of a 64-bit number
_space = re.compile(r"[ \t\n\r]*").match


def walk(text: str, visit: Callable[[str, Any], None]) -> None:
    """Call `visit(key, entry)` for each tensor in the header `text`, in turn.

    Raises:
        ValueError: not the form of a header, a key twice, or an entry or key that is too long.
        RecursionError: an entry is nested too deeply.
    """
    seen: set[str] = set()

    def member(key: str, at: int) -> int:
        if key in seen:
            raise ValueError(f"key {shortened(key)} appears twice")
        if len(key) > MAX_KEY_LENGTH:
            raise ValueError(f"key {shortened(key)} is longer than {MAX_KEY_LENGTH} characters")
        seen.add(key)
        if key == _METADATA:
            if text.startswith("null", at):
                return at + 4
            return _object(text, at, lambda _, value: _string(text, value)[1])
        entry, end = _entry(key, text[at : at + MAX_ENTRY_LENGTH])
        visit(key, entry)
        return at + end

    end = _past_space(text, _object(text, _past_space(text, 0), member))
    if end != len(text):
        raise ValueError(f"text after its end, at character {end}")


def _object(text: str, at: int, member: Callable[[str, int], int]) -> int:
    """Walk the JSON object that begins at `at`; returns its end.

    `member(key, at)` gets the place of each value and returns the value's end.
    """
    at = _past_space(text, _past(text, at, "{", "no JSON object"))
    if text.startswith("}", at):
        return at + 1
    while True:
        key, at = _string(text, at)
        at = _past(text, _past_space(text, at), ":", "a colon is missing")
        at = _past_space(text, member(key, _past_space(text, at)))
        if not text.startswith(",", at):
            return _past(text, at, "}", "a comma or brace is missing")
        at = _past_space(text, at + 1)


def _string(text: str, at: int) -> tuple[str, int]:
    """The JSON string that begins at `at`, and its end."""
    _past(text, at, '"', "a string is missing")
    value, end = _decoder.raw_decode(text, at)
    if not is_utf8(value):
        raise ValueError(f"a string that is no Unicode at character {at}: {shortened(value)}")
    return value, end


def _past_space(text: str, at: int) -> int:
    match = _space(text, at)
    return at if match is None else match.end()


def _past(text: str, at: int, token: str, otherwise: str) -> int:
    if not text.startswith(token, at):
        raise ValueError(f"{otherwise} at character {at}")
    return at + 1


def _entry(key: str, text: str) -> tuple[Any, int]:
    """The JSON value at the start of `text`, and its end."""
    try:
        return _decoder.raw_decode(text)
    except JSONDecodeError:
        if len(text) < MAX_ENTRY_LENGTH:
            raise
        raise ValueError(
            f"the entry of {shortened(key)} is no JSON of at most {MAX_ENTRY_LENGTH} characters"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field appears twice")
    return fields


def _size(digits: str) -> int:
    """A number of 64 bits; -1, which is no size, for others."""
    if len(digits) > _MAX_DIGITS or digits.startswith("-"):
        return -1
    value = int(digits)
    return value if value < 1 << 64 else -1


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_decoder = JSONDecoder(object_pairs_hook=_unique, parse_int=_size, parse_constant=_no_number)
