"""Global memory made of the caller's arrays, shared memory of a batch of blocks: who is asked for
bytes checks that they lie within one array, or within the block's shared memory, and are aligned.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.gpu.simulator.numbers import POISON, UNSIGNED, Array

BASE = 0x7F0000000000
"""Address of the first array: what drops the high half of a pointer leaves all arrays."""
GAP = 4096
"""At least so many bytes between arrays belong to none."""
SECTOR = 32

Piece = tuple[Array | None, Array, Array]
"""Which of the addresses (None: all), the bytes that they lie in, offsets into these."""


@dataclass
class Segment:
    name: str
    address: int
    data: Array
    """uint8, the caller's own bytes."""
    read: Array
    """Sectors of 32 bytes that were read, bool."""


class GlobalMemory:
    """Arrays at addresses. They are used in place, never copied: even huge ones cost nothing."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._starts: list[int] = []
        self._top = BASE

    def add(self, name: str, array: Array) -> int:
        """Gives a C-contiguous array an address, a multiple of 256."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        data = array.reshape(-1).view(np.uint8)
        address = self._top
        self._top += -(-data.size // 256) * 256 + GAP
        touched = np.zeros(-(-data.size // SECTOR), bool)
        self.segments.append(Segment(name, address, data, touched))
        self._starts.append(address)
        return address

    def segment(self, address: int) -> Segment | None:
        """The segment whose gap, at the latest, the address lies in."""
        index = bisect_right(self._starts, address) - 1
        return self.segments[index] if index >= 0 else None

    def pieces(self, address: Array, size: int) -> Iterator[tuple[Segment, Piece]]:
        """The arrays that accesses of `size` bytes lie in."""
        low, high = int(address.min()), int(address.max())
        segment = self.segment(low)
        if (
            segment
            and low >= segment.address
            and high + size <= segment.address + segment.data.size
        ):
            yield segment, (None, segment.data, address - segment.address)
            return
        owner = np.searchsorted(np.array(self._starts), address, "right") - 1
        for index in np.unique(owner):
            which = owner == index
            there = address[which]
            segment = self.segments[max(index, 0)]
            outside = (there < segment.address) | (
                there + size > segment.address + segment.data.size
            )
            if outside.any():
                raise IndexError(
                    f"out of bounds: {size} bytes at {segment.name}"
                    f"{int(there[outside][0]) - segment.address:+d}, which has {segment.data.size}"
                )
            yield segment, (which, segment.data, there - segment.address)


class SharedMemory:
    """One array for all blocks of a batch; nobody may leave his own part of `size` bytes."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16 + 16
        self.data = np.full(blocks * self.stride // 8, POISON, np.uint64).view(np.uint8)

    def piece(self, block: Array, address: Array, size: int) -> Piece:
        if int(address.min()) < 0 or int(address.max()) + size > self.size:
            wrong = int(address.max()) if int(address.min()) >= 0 else int(address.min())
            raise IndexError(
                f"out of bounds: {size} bytes at {wrong} of shared memory, which has {self.size}"
            )
        return None, self.data, block * self.stride + address


def check_alignment(address: Array, size: int) -> None:
    if int(np.bitwise_or.reduce(address)) & (size - 1):
        wrong = address[address % size != 0][0]
        raise ValueError(f"misaligned: {size} bytes at address {int(wrong):#x}")


def gather(piece: Piece, word: int, count: int) -> Array:
    """[addresses, count] words of `word` bytes."""
    _, data, offset = piece
    return _rows(data, word, count)[offset // (word * count)]


def scatter(piece: Piece, values: Array) -> None:
    """Stores [addresses, count] words; of two at one address the last stays."""
    _, data, offset = piece
    word, count = values.dtype.itemsize, values.shape[1]
    _rows(data, word, count)[offset // (word * count)] = values


def _rows(data: Array, word: int, count: int) -> Array:
    size = word * count
    return data[: data.size // size * size].view(UNSIGNED[word]).reshape(-1, count)
