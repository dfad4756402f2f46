"""Pairs of codes, 16 bits apart in a register, as pairs of bf16: by bits and one exact operation.

Functions take and give Uint32 of the DSL. bf16 has 8 significant bits: sign, 8 bits of exponent
(bias 127), 7 of mantissa.
"""

from __future__ import annotations

from typing import Any

LOW_HALVES = 0x0001_0001
"""Times a number of up to 16 bits: that number twice."""
_WHOLE = 0x4300_4300
"""128 twice as bf16, whose last bit is worth 1: its low seven bits hold an integer."""
_MINUS_WHOLE = 0xC300_C300
_SIGNS = 0x8000_8000


def power_pair(exponent: int) -> int:
    """2^exponent twice."""
    return (exponent + 127 << 7) * LOW_HALVES


def scaled(pair: Any, factor: Any) -> Any:
    """pair * factor in bf16; the factor is a pair or a constant, pairs as they lie in a register.
    -0 is added, so that zeros keep their sign. `mul.bf16x2` would do, but sm_80 lacks it."""
    from cutlass import Uint32
    from cutlass.cute.arch import inline_ptx

    # The instruction takes no constants.
    constant = isinstance(factor, int)
    value, given = (f"{factor:#x}", []) if constant else ("{$r1}", [factor])
    return inline_ptx(
        f"{{ .reg .b32 s, z; mov.b32 s, {value}; mov.b32 z, {_SIGNS:#x}; "
        f"fma.rn.bf16x2 {{$w0}}, {{$r0}}, s, z; }}",
        write_only_types=[Uint32],
        read_only_args=[pair, *given],
    )


def _plus(pair: Any, addend: Any) -> Any:
    """pair + addend in bf16: `add.bf16x2` is missing on sm_80, too."""
    from cutlass import Uint32
    from cutlass.cute.arch import inline_ptx

    return inline_ptx(
        f"{{ .reg .b32 s, a; mov.b32 s, {power_pair(0):#x}; mov.b32 a, {{$r1}}; "
        f"fma.rn.bf16x2 {{$w0}}, {{$r0}}, s, a; }}",
        write_only_types=[Uint32],
        read_only_args=[pair, addend],
    )


def e2m1_pair(word: Any, n: int) -> Any:
    """Nibbles n and n + 4 of a word, E2M1, times 2^-126.

    Moved to the top of each half, sign | magnitude >> 6 is a bf16 with the code's exponent and
    mantissa bits in the lowest exponent bits and the highest mantissa bit; 0.5 is a subnormal there
    as it is in E2M1.
    """
    from cutlass import Uint32

    moved = word << Uint32(4 * (3 - n)) if n < 3 else word
    return (moved & Uint32(_SIGNS)) | ((moved & Uint32(0x7000_7000)) >> Uint32(6))


def e4m3_pair(word: Any, n: int, *, finite: bool = False) -> Any:
    """Bytes n and n + 2 of a word, E4M3, times 2^-120: likewise, with four bits of exponent (bias
    7) and three of mantissa.

    The two NaN codes have all seven bits set: one more is 0x80, and that in the upper byte of a
    half, less itself shifted by 8, all of bf16's exponent bits. `finite`: there are none.
    """
    from cutlass import Uint32

    moved = word << Uint32(8) if n == 0 else word
    magnitudes = moved & Uint32(0x7F00_7F00)
    pair = (moved & Uint32(_SIGNS)) | (magnitudes >> Uint32(4))
    if finite:
        return pair
    nan = (magnitudes + Uint32(0x0100_0100)) & Uint32(_SIGNS)
    return pair | (nan - (nan >> Uint32(8)))


def int8_pair(word: Any, n: int) -> Any:
    """Bytes n and n + 2 of a word, signed. Seven bits are 128 + m; the sign says whether 128 or 256
    are taken away, which differ in the last bit of the exponent, where the sign is added."""
    from cutlass import Uint32

    moved = word >> Uint32(8) if n else word
    whole = (moved & Uint32(0x007F_007F)) | Uint32(_WHOLE)
    less = (moved & Uint32(0x0080_0080)) | Uint32(_MINUS_WHOLE)
    return _plus(whole, less)


def integer_pair(pair: Any, zero: Any) -> Any:
    """Integers of up to 6 bits in the halves of a register, less `zero`: a constant, or an Uint32
    up to 127."""
    from cutlass import Uint32

    if isinstance(zero, int):
        less = Uint32(_MINUS_WHOLE + zero * LOW_HALVES)
    else:
        less = zero * Uint32(LOW_HALVES) + Uint32(_MINUS_WHOLE)
    return _plus(pair | Uint32(_WHOLE), less)


def byte_permute(a: Any, b: Any, selector: Any) -> Any:
    """`prmt`: four bytes of {b, a}, byte i the one that nibble i of the selector says."""
    from cutlass import Uint32
    from cutlass.cute.arch import inline_ptx

    return inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Uint32],
        read_only_args=[a, b, selector],
    )


def looked_up(word: Any, first: int, table: tuple[int, ...]) -> Any:
    """Signed bytes that a table of 16 has for nibbles 2 first, 2 first + 1, and the two of the same
    names four nibbles on. A lookup has eight entries: the third says which of two is right."""
    from cutlass import Uint32

    parts = [bytes(v & 0xFF for v in table[at : at + 4]) for at in range(0, 16, 4)]
    words = [Uint32(int.from_bytes(part, "little")) for part in parts]
    four = byte_permute(word, word, Uint32(0x0020 + 0x0011 * first))  # bytes `first`, `first` + 2
    places = four & Uint32(0x7777)
    low = byte_permute(words[0], words[1], places)
    high = byte_permute(words[2], words[3], places)
    chosen = ((four & Uint32(0x8888)) >> Uint32(1)) | Uint32(0x3210)
    return byte_permute(low, high, chosen)
