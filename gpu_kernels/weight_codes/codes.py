"""Codes of a strip as A fragments: what a lane reads, and the pairs of bf16 that come out of it.

A class for each kind of code. Its `registers` hold the lane's words of half a group, [load][row of
four], then those of upper bits. `lane` is where the lane is: its first row in the strip, and q.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hybrid_moe.formats.strips import STRIP_ROWS, StripLayout
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.fragments import HALF_ROWS, load_word, loads_per_group, takes_quads
from hybrid_moe.gpu_kernels.weight_codes import pairs

ROWS = 4
"""Of a lane, in half a strip."""
WORDS = 4 * STRIP_ROWS
"""Bytes of a word of all rows."""
HALF_WORDS = 4 * HALF_ROWS


class Lane(NamedTuple):
    """Where a lane is, as Int32 of the DSL: `row` is its first row in the strip, in the first half
    that its warp has; `q` its number among the lanes with these rows."""

    row: Any
    q: Any


class Codes:
    """What all kinds share: the words.

    Attributes:
        registers: words of a lane in half a group.
        exponent: of floats, of the power of two that is left when their bits are moved (`pairs`).
    """

    exponent = 0

    def __init__(self, fmt: WeightFormat, layout: StripLayout) -> None:
        self.fmt, self.layout = fmt, layout
        self.loads = loads_per_group(fmt)
        self.high = layout.high_words
        self.registers = ROWS * (self.loads + self.high)
        self.by_quads = takes_quads(fmt)

    def _lane_words(self, lane: Lane) -> Any:
        """Bytes from word 0 of row 0 to the lane's first word, of row 0: `fragments.load_word`."""
        if not self.by_quads or self.fmt.bits == 8:
            return WORDS * lane.q
        return WORDS * (lane.q >> 1) if self.fmt.bits == 4 else 0

    def lane_offset(self, lane: Lane) -> Any:
        """Bytes from a group's codes to the lane's first word."""
        return self._lane_words(lane) + 4 * lane.row

    def chunk(self, codes: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        """The loads of one half of a group, in the order of registers: address and words of each.

        Args:
            codes: address of the lane's first word in the group.
        """
        from cutlass import Int64

        start = HALF_WORDS * half
        words = [load_word(self.fmt, 0, load) for load in range(self.loads)]
        found = [(codes + (WORDS * word + start), ROWS) for word in words]
        if self.high:
            high = codes + Int64(self.layout.high_offset - self._lane_words(lane))
            found += [(high + (WORDS * word + start), ROWS) for word in range(self.high)]
        return found

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        """The two pairs of a row (of the lane's four) and k-step: uint32, pairs of bf16.

        Args:
            operand: of floats the scale, a pair of bf16 over 2^`exponent`; of integers the row's
                zero point, an Uint32. None: there is none.
        """
        raise NotImplementedError


class E2m1Codes(Codes):
    """Four-bit floats."""

    exponent = -126

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        factor = pairs.power_pair(-self.exponent) if operand is None else operand
        places = (2 * step, 2 * step + 1)
        return [pairs.scaled(pairs.e2m1_pair(words[row], n), factor) for n in places]


class E4m3Codes(Codes):
    """Eight-bit floats."""

    exponent = -120

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        factor = pairs.power_pair(-self.exponent) if operand is None else operand
        word = words[ROWS * step + row]
        return [pairs.scaled(pairs.e4m3_pair(word, n), factor) for n in range(2)]


class ByteCodes(Codes):
    """Signed bytes."""

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        return [pairs.int8_pair(words[ROWS * step + row], n) for n in range(2)]


class TableCodes(Codes):
    """Four-bit numbers of a table of signed bytes."""

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        four = pairs.looked_up(words[row], step, self.fmt.code.integers)
        return [pairs.int8_pair(four, n) for n in range(2)]


class IntegerCodes(Codes):
    """Integers of 2 to 6 bits, of which the lowest value is -zero."""

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        zero = -self.fmt.code.integers[0] if operand is None else operand
        found = []
        for n in range(2):
            pair = self._quad(words, row, step, n, lane) if self.by_quads else None
            pair = self._of_word(words, row, 2 * step + n, lane) if pair is None else pair
            found.append(pairs.integer_pair(pair, zero))
        return found

    def _of_word(self, words: Any, row: int, n: int, lane: Lane) -> Any:
        """Nibbles n and n + 4 of a word; the fifth bit of nibble 2b + p is bit 2q + p of byte b."""
        from cutlass import Uint32

        low = (words[row] >> Uint32(4 * n)) & Uint32(0x000F_000F)
        if not self.high:
            return low
        high = words[ROWS + row] >> (Uint32(lane.q) << Uint32(1))
        return low | _moved(high, 8 * (n // 2) + n % 2, 4, 0x0010_0010)

    def _quad(self, words: Any, row: int, step: int, n: int, lane: Lane) -> Any:
        """Codes in bytes n and n + 2 of the lane's quad of a k-step. With quads of a word numbered
        through the group, it is quad 4 step + q; `weight_format.unpack_high` has the upper bits."""
        from cutlass import Uint32

        bits = self.fmt.bits
        mask = ((1 << bits) - 1) * pairs.LOW_HALVES
        in_word = lane.q & (8 // bits - 1)  # quads of the word that come before
        low = words[ROWS * step + row] >> (Uint32(in_word) * Uint32(bits) + Uint32(8 * n))
        low = low & Uint32(mask)
        if not self.high:
            return low
        # bit or pair of bits 4 step + q of a byte: of the first word, or of word `step`
        word = ROWS * (self.loads + (step if self.high > 1 else 0)) + row
        high = words[word] >> (Uint32(lane.q) * Uint32(self.high))
        mask = ((1 << self.high) - 1 << bits) * pairs.LOW_HALVES
        return low | _moved(high, 8 * n + (0 if self.high > 1 else 4 * step), bits, mask)


def _moved(word: Any, source: int, target: int, mask: int) -> Any:
    """Bits of a word from place `source` at place `target`, where the mask has ones."""
    from cutlass import Uint32

    by = source - target
    moved = word >> Uint32(by) if by > 0 else word << Uint32(-by)
    return moved & Uint32(mask)


class Bf16Codes(Codes):
    """Pairs as they lie there."""

    def pairs(self, words: Any, row: int, step: int, lane: Lane, operand: Any) -> list[Any]:
        return [words[ROWS * load + row] for load in (2 * step, 2 * step + 1)]


CODES: Mapping[str, type[Codes]] = MappingProxyType(
    {
        "e2m1": E2m1Codes,
        "e4m3": E4m3Codes,
        "int8": ByteCodes,
        "bf16": Bf16Codes,
        "iq4": TableCodes,
        **dict.fromkeys(("int4", "uint4", "uint5", "int5", "int6", "uint2", "int3"), IntegerCodes),
    }
)
"""Type of codes -> its class."""
