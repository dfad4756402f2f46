"""Global memory made of the caller's arrays, shared memory of a batch of blocks: who is asked for
bytes checks that they lie within one array, or within the block's shared memory, and are aligned.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.gpu.simulator.numbers import POISON, UNSIGNED, Array

BASE = 0x7F0000000000
"""Address of the first array: what drops the high half of a pointer leaves all arrays."""
GAP = 4096
"""At least so many bytes between arrays belong to none."""


@dataclass(frozen=True)
class Segment:
    """Bytes with a name: an array, "" is shared memory."""

    name: str
    address: int
    data: Array

    def load(self, offset: Array, word: int, count: int) -> Array:
        """[addresses, count] words of `word` bytes."""
        return self._rows(word, count)[offset // (word * count)]

    def store(self, offset: Array, values: Array) -> None:
        """Stores [addresses, count] words; of two at one address the last stays."""
        word, count = values.dtype.itemsize, values.shape[1]
        self._rows(word, count)[offset // (word * count)] = values

    def _rows(self, word: int, count: int) -> Array:
        whole = self.data.size // (word * count) * word * count
        return self.data[:whole].view(UNSIGNED[word]).reshape(-1, count)


Piece = tuple[Any, Segment, Array]
"""Which of the addresses, the segment that they lie in, their offsets there."""


class GlobalMemory:
    """Arrays at addresses. They are used in place, never copied: even huge ones cost nothing."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._top = BASE

    def add(self, name: str, array: Array) -> int:
        """Gives a C-contiguous array an address, a multiple of 256."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        address, data = self._top, array.reshape(-1).view(np.uint8)
        self._top += -(-data.size // 256) * 256 + GAP
        self._segments.append(Segment(name, address, data))
        self._starts.append(address)
        return address

    def pieces(self, address: Array, size: int) -> list[Piece]:
        """The arrays that accesses of `size` bytes lie in."""
        low, high = int(address.min()), int(address.max())
        if not self._segments:
            raise IndexError(f"out of bounds: {size} bytes at {low:#x}, and there are no arrays")
        segment = self._segments[max(bisect_right(self._starts, low) - 1, 0)]
        if low >= segment.address and high + size <= segment.address + segment.data.size:
            return [(slice(None), segment, address - segment.address)]
        owner = np.searchsorted(np.array(self._starts), address, "right") - 1
        pieces = []
        for index in np.unique(owner):
            segment, (which,) = self._segments[max(index, 0)], np.nonzero(owner == index)
            offset = address[which] - segment.address
            outside = offset[(offset < 0) | (offset + size > segment.data.size)]
            if outside.size:
                raise IndexError(
                    f"out of bounds: {size} bytes at {segment.name}{int(outside[0]):+d}, "
                    f"which has {segment.data.size}"
                )
            pieces.append((which, segment, offset))
        return pieces


class SharedMemory:
    """One array for all blocks of a batch; nobody may leave his own part of `size` bytes."""

    def __init__(self, blocks: int, size: int) -> None:
        self._size, self._stride = size, -(-size // 16) * 16 + 16
        words = np.full(blocks * self._stride // 8, POISON, np.uint64)
        self._segment = Segment("", 0, words.view(np.uint8))

    def pieces(self, block: Array, address: Array, size: int) -> list[Piece]:
        outside = address[(address < 0) | (address + size > self._size)]
        if outside.size:
            raise IndexError(
                f"out of bounds: {size} bytes at {int(outside[0])} of shared memory, "
                f"which has {self._size}"
            )
        return [(slice(None), self._segment, block * self._stride + address)]


def check_alignment(address: Array, size: int) -> None:
    if int(np.bitwise_or.reduce(address)) & (size - 1):
        wrong = int(address[address % size != 0][0])
        raise ValueError(f"misaligned: {size} bytes at address {wrong:#x}")
