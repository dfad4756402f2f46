"""The bytes of a GGUF header, taken one field after the other: none is read past the file's end."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.regular import shortened

MAX_HEADER_BYTES = 100_000_000
"""The largest vocabularies have some 15 MB. It also bounds what a file of any length costs."""
KEPT_STRING = 1 << 20
"""Bytes of a string that is kept; longer ones are walked over, as arrays of strings are."""
KEPT_ARRAY = 4096
"""Numbers of an array that is kept: lists by layer are, scores of a vocabulary are not."""
_CHUNK = 1 << 18


@dataclass(frozen=True)
class LeftOut:
    """A value that was walked over: a long string, or an array.

    Attributes:
        kind: of the elements: "string", "float32", ...
        count: of elements, or of a string's bytes.
    """

    kind: str
    count: int


Value: TypeAlias = int | float | bool | str | tuple[int | float | bool, ...] | LeftOut

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
_NUMBERS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("uint8", "B"),
        1: ("int8", "b"),
        2: ("uint16", "H"),
        3: ("int16", "h"),
        UINT32: ("uint32", "I"),
        5: ("int32", "i"),
        6: ("float32", "f"),
        BOOL: ("bool", "B"),
        10: ("uint64", "Q"),
        11: ("int64", "q"),
        12: ("float64", "d"),
    }
)
"""Type -> name, and `struct`'s letter."""


class HeaderBytes:
    """Reads a header from an open file of `size` bytes, in order.

    Attributes:
        size: of the file.
        file: its name, for messages.
        position: bytes taken so far.
    """

    def __init__(self, descriptor: int, size: int, file: Path) -> None:
        self.size, self.file, self.position = size, file, 0
        self._descriptor = descriptor
        self._buffer = bytearray()

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes; `what` they are, for messages."""
        start = self._pass(nbytes, what)
        return bytes(self._buffer[start : self.position])

    def integer(self, nbytes: int, what: str) -> int:
        """The next unsigned number."""
        start = self._pass(nbytes, what)
        return int.from_bytes(self._buffer[start : self.position], "little")

    def count(self, what: str, most: int, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, of which there are `most`."""
        count = self.integer(8, f"number of {what}")
        if count > most:
            raise CheckpointError(
                f"{self.file}: {count} {what}, at most {most} are possible: it is damaged"
            )
        self._check_room(count * smallest, f"{count} {what}")
        return count

    def text(self, what: str, most: int) -> str:
        """A string of at most `most` bytes."""
        length = self.integer(8, f"length of {what}")
        if length > most:
            raise CheckpointError(
                f"{self.file}: {what} has {length} bytes, at most {most} are read"
            )
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file}: {what}, {shortened(raw)}, is no UTF-8") from error

    def tensor(self, name: str, most_axes: int) -> tuple[tuple[int, ...], int, int]:
        """Shape (outermost axis first), number of the type and offset of a tensor."""
        axes = self.integer(4, f"number of axes of {name}")
        if axes > most_axes:
            raise CheckpointError(
                f"{name} in {self.file}: {axes} axes, at most {most_axes} are possible"
            )
        start = self._pass(8 * axes + 12, f"entry of tensor {name}")
        *dimensions, kind, offset = struct.unpack_from(f"<{axes}QIQ", self._buffer, start)
        return tuple(reversed(dimensions)), kind, offset

    def check_kind(self, key: str, wanted: int) -> None:
        """Raise unless the value that follows is a number of that type."""
        self._need(4, f"type of {key}")
        kind = int.from_bytes(self._buffer[self.position : self.position + 4], "little")
        if kind != wanted:
            name = self._kind(key, wanted)[0]
            raise CheckpointError(f"{self.file}: {key} is of type {kind}, must be a {name}")

    def value(self, key: str) -> Value:
        """The value of `key`, its type first."""
        kind = self.integer(4, f"type of {key}")
        if kind == STRING:
            return self._string(key)
        if kind == ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0]

    def _string(self, key: str) -> Value:
        length = self.integer(8, f"length of {key}")
        if length > KEPT_STRING:
            self._pass(length, key)
            return LeftOut("string", length)
        self.position -= 8
        return self.text(key, KEPT_STRING)

    def _array(self, key: str) -> Value:
        kind = self.integer(4, f"type of the elements of {key}")
        count = self.integer(8, f"length of {key}")
        if kind == STRING:
            self._check_room(8 * count, key)
            self._walk_strings(count, key)
            return LeftOut("string", count)
        name, letter = self._kind(key, kind)
        if count > KEPT_ARRAY:
            self._pass(count * struct.calcsize(letter), key)
            return LeftOut(name, count)
        return self._numbers(key, kind, count)

    def _walk_strings(self, count: int, key: str) -> None:
        """Pass `count` strings."""
        length = struct.Struct("<Q").unpack_from
        position, buffer, room = self.position, self._buffer, len(self._buffer) - 8
        for _ in range(count):
            if position > room:
                self.position = position
                self._need(8, key)
                room = len(buffer) - 8
            position += 8 + length(buffer, position)[0]
        self.position = position
        self._need(0, key)

    def _kind(self, key: str, kind: int) -> tuple[str, str]:
        if kind == ARRAY:
            raise CheckpointError(f"{self.file}: {key} is an array of arrays, which is not read")
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self.file}: {key} has a value of type {kind}, there is none")
        return _NUMBERS[kind]

    def _numbers(self, key: str, kind: int, count: int) -> tuple[int | float | bool, ...]:
        _, letter = self._kind(key, kind)
        start = self._pass(count * struct.calcsize(letter), key)
        numbers = struct.unpack_from(f"<{count}{letter}", self._buffer, start)
        if kind != BOOL:
            return numbers
        wrong = next((number for number in numbers if number > 1), None)
        if wrong is not None:
            raise CheckpointError(f"{self.file}: {key} is a bool of {wrong}, must be 0 or 1")
        return tuple(map(bool, numbers))

    def _check_room(self, nbytes: int, what: str) -> None:
        """Raise where so many bytes are not left."""
        end = self.position + nbytes
        if end > self.size:
            raise CheckpointError(
                f"{self.file}: truncated: {what} should end at byte {end} or later, the file has "
                f"{self.size}"
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.file}: {what} would make a header of more than {MAX_HEADER_BYTES} bytes"
            )

    def _pass(self, nbytes: int, what: str) -> int:
        """Where the next `nbytes` bytes begin in the buffer, which then has them."""
        self._need(nbytes, what)
        start = self.position
        self.position += nbytes
        return start

    def _need(self, nbytes: int, what: str) -> None:
        self._check_room(nbytes, what)
        end = self.position + nbytes
        while len(self._buffer) < end:
            wanted = max(_CHUNK, len(self._buffer), end - len(self._buffer))
            wanted = min(wanted, MAX_HEADER_BYTES - len(self._buffer))
            part = os.pread(self._descriptor, wanted, len(self._buffer))
            if not part:
                raise CheckpointError(f"{self.file}: became shorter while it was read")
            self._buffer += part
