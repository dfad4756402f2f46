"""Factors of ggml's superblocks: 256 inputs share fp16 numbers, groups of them have integers.

A block of a strip is a superblock, eight groups of 32 inputs. s = d * integer and m = -dmin *
integer have at most 11 + 7 significant bits: exact in float32.
"""

from __future__ import annotations

from typing import Any

from hybrid_moe.formats.strips import StripLayout
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.weight_codes import fields as of
from hybrid_moe.gpu_kernels.weight_codes.codes import Lane
from hybrid_moe.gpu_kernels.weight_codes.scale_kinds import Scaling


def _shifted(word: Any, by: Any, bits: int) -> Any:
    """A field of a word: Uint32."""
    from cutlass import Uint32

    return (word >> Uint32(by)) & Uint32((1 << bits) - 1)


class Superblock(Scaling):
    """What all have: the integers of a group in registers, then `factors`."""

    ways = (False,)
    fields_ahead = False
    numbers = 0
    """Words of integers."""

    def __init__(self, fmt: WeightFormat, layout: StripLayout) -> None:
        super().__init__(fmt, layout)
        self.count = self.named["factors"].count
        self.has_offsets = self.count == 2
        self.registers = self.numbers + 2 * self.count

    def integers(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        """The loads of a group's integers."""
        raise NotImplementedError

    def scale(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        """The integer of a factor: Int32."""
        raise NotImplementedError

    def minimum(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        """That of an offset."""
        raise NotImplementedError

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        factors = [
            self._load(fields, "factors", lane, half, element) for element in range(self.count)
        ]
        return self.integers(fields, group, lane, half) + factors

    def factor(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Float32

        d = of.fp16(words[self.numbers : self.numbers + 2], row)
        return d * Float32(self.scale(words, row, step, group))

    def offset(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Float32

        dmin = of.fp16(words[self.numbers + 2 :], row)
        return dmin * Float32(-self.minimum(words, row, step, group))


class SixBitPairs(Superblock):
    """Q4_K, Q5_K: a word with the lower four bits of eight scales, one with those of eight minima,
    and one with the upper two of both, a scale's and a minimum's in turn."""

    numbers = 12

    def integers(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        return [self._load(fields, "scales", lane, half, word) for word in range(3)]

    def scale(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        return self._number(words, row, group, 0)

    def minimum(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        return self._number(words, row, group, 1)

    def _number(self, words: list[Any], row: int, group: Any, which: int) -> Any:
        from cutlass import Int32, Uint32

        at = Uint32(self._in_block(group)) * Uint32(4)
        low = _shifted(words[4 * which + row], at, 4)
        high = _shifted(words[8 + row], at + Uint32(2 * which), 2)
        return Int32(low | (high << Uint32(4)))


class SixBits(Superblock):
    """Q3_K, IQ4_XS: scales of six bits, less 32: words of the lower four bits of all, then one of
    the upper two; of 32 bits for sixteen scales, of 16 bits for eight. So four groups have the word
    of their lower bits in common."""

    def __init__(self, fmt: WeightFormat, layout: StripLayout) -> None:
        self.numbers = 2 * layout.field("scales").itemsize
        super().__init__(fmt, layout)

    def integers(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        from cutlass import Int32

        low = self._in_block(group) >> Int32(2)
        return [self._load(fields, "scales", lane, half, element) for element in (low, 2)]

    def scale(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Int32, Uint32

        size = self.numbers // 2
        number = Uint32(self._in_block(group))
        if size == 4:  # sixteen: two in a group
            number = number * Uint32(2) + Uint32(step)
            in_word, (low, high) = Uint32(7), (words[row], words[4 + row])
        else:
            in_word = Uint32(3)
            low, high = of.half_word(words[:2], row), of.half_word(words[2:4], row)
        s = _shifted(low, (number & in_word) * Uint32(4), 4)
        s = s | (_shifted(high, number * Uint32(2), 2) << Uint32(4))
        return Int32(s) - Int32(32)


class SignedBytes(Superblock):
    """Q6_K: sixteen signed bytes."""

    numbers = 2

    def integers(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        from cutlass import Int32

        first = self._in_block(group) * Int32(2)
        return [self._load(fields, "scales", lane, half, first + Int32(i)) for i in range(2)]

    def scale(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Int32, Uint32

        return Int32(words[step] << Uint32(24 - 8 * row)) >> Int32(24)


class NibblePairs(Superblock):
    """Q2_K: sixteen bytes, a scale in the low nibble and a minimum in the high one."""

    numbers = 2
    integers = SignedBytes.integers

    def scale(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Int32

        return Int32(_shifted(words[step], 8 * row, 4))

    def minimum(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        from cutlass import Int32

        return Int32(_shifted(words[step], 8 * row + 4, 4))
