"""From the fields of a strip to the factors of a panel: what `WeightFormat.scaling` names.

A function of the table makes, for (emit, place, panel, half), the 16 scales of a panel's rows in a
group, or in one half of it, and what is added to the products: see `Scale`. The NumPy meaning is
`WeightFormat.factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place, field_address
from hybrid_moe.formats.integers import INT4_OFFSET
from hybrid_moe.formats.strips import PANEL_ROWS, StripField, StripLayout
from hybrid_moe.formats.weight_format import GROUP, WeightFormat


@dataclass(frozen=True)
class Scale:
    """What turns the integer sum of a group into its part of the product, float32 [16] each.

    Attributes:
        factor: the scales.
        exponent: theirs, where they are powers of two.
        zero: zero points, whole numbers, each times the sum of the inputs to be taken off before.
        minimum: what the sum of the inputs, in units of the scaled product, is multiplied by and
            added.
    """

    factor: Val
    exponent: Val | None = None
    zero: Val | None = None
    minimum: Val | None = None

    def times(self, emit: Emit, value: Val, by_exponent: bool) -> Val:
        """value * scale. By exponent where it has one: on some tiers that leaves the multipliers to
        the dot products. The bits are the same."""
        if by_exponent and self.exponent is not None:
            return emit.op("times_power", value, self.factor, self.exponent)
        return value * self.factor


ScaleOf = Callable[[Emit, Place, "Val | int", int], Scale]


class Fields:
    """Reads the fields of a strip of one format."""

    def __init__(self, fmt: WeightFormat, layout: StripLayout) -> None:
        self.fmt, self.layout = fmt, layout
        self._by_name = {f.name: f for f in (*layout.fields, *layout.row_fields)}

    def load(
        self, emit: Emit, place: Place, panel: Val | int, name: str, element: Val | int = 0
    ) -> Val:
        """16 elements of a panel's rows: integers of the field's size."""
        field = self._by_name[name]
        kind = {1: I8, 2: I16, 4: I32}[field.itemsize]
        at = self._at(place, field, panel, element)
        return emit.load(at, kind, PANEL_ROWS, align=PANEL_ROWS * field.itemsize)

    def shared(self, emit: Emit, place: Place, panel: Val | int, name: str) -> Val:
        """The float32 that a panel's rows share, in 16 lanes."""
        at = self._at(place, self._by_name[name], panel, 0)
        return emit.broadcast(emit.load(at, F32, align=4), PANEL_ROWS)

    def half_float(
        self, emit: Emit, place: Place, panel: Val | int, name: str, element: Val | int = 0
    ) -> Val:
        """16 fp16 as float32."""
        return emit.op("half_to_float", self.load(emit, place, panel, name, element))

    def _at(self, place: Place, field: StripField, panel: Val | int, element: Val | int) -> Val:
        at = field_address(place, self.layout, field, panel)
        return at + element * field.element_bytes

    def element(self, place: Place, half: int) -> Val | int:
        """Which of a block's elements, one for `fmt.group` inputs each, a half of a group has."""
        group = self.fmt.group
        if place.index is None:
            return half if 0 < group < GROUP else 0
        if group < GROUP:
            return place.index * (GROUP // group) + half
        return place.index >> ((group // GROUP).bit_length() - 1)


def e8m0(emit: Emit, byte: Val) -> Scale:
    """16 E8M0 bytes. Byte 0 is 2^-127, whose bits are 0x00400000 and not 0."""
    wide = byte.zext(I32)
    bits = wide << 23
    power = (bits < 0x00400000).select(0x00400000, bits).bits(F32)
    return Scale(power, (wide - 127).to_float())


def e4m3_to_float(byte: Val) -> Val:
    """16 E4M3 bytes as float32, exact: the bits of exponent and mantissa in the places of a
    float32's are 2^-120 of the value, subnormal ones included. No NaN: it is refused at load."""
    wide = byte.zext(I32)
    magnitude = ((wide & 0x7F) << 20).bits(F32) * 2.0**120
    return (magnitude.bits(I32) | ((wide & 0x80) << 24)).bits(F32)


def _power(fields: Fields) -> ScaleOf:
    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        return e8m0(emit, fields.load(emit, place, panel, "scales", fields.element(place, half)))

    return scale


def _numbers(fields: Fields) -> Callable[[Emit, Place, Val | int, int], Val]:
    """Plain scales: fp16, bf16 or float32."""
    assert fields.fmt.scale is not None
    name = fields.fmt.scale.name

    def numbers(emit: Emit, place: Place, panel: Val | int, half: int) -> Val:
        stored = fields.load(emit, place, panel, "scales", fields.element(place, half))
        if name == "fp16":
            return emit.op("half_to_float", stored)
        return (stored.zext(I32) << 16).bits(F32) if name == "bf16" else stored.bits(F32)

    return numbers


def _plain(fields: Fields) -> ScaleOf:
    numbers = _numbers(fields)
    return lambda *where: Scale(numbers(*where))


def _shared(fields: Fields) -> ScaleOf:
    """A float32 for all rows of a panel."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        return Scale(fields.shared(emit, place, panel, "scales"))

    return scale


def _with_zero(added: int) -> Callable[[Fields], ScaleOf]:
    """Zero points are nibbles, two in a byte; a code n means n - 8 here, so they are 8 less too."""

    def make(fields: Fields) -> ScaleOf:
        numbers, group = _numbers(fields), fields.fmt.group

        def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
            zero: Val
            if group == 0 or place.index is None:
                zero = fields.load(emit, place, panel, "minima").zext(I32)
            else:
                nth = fields.element(place, half)
                assert isinstance(nth, Val)
                byte = fields.load(emit, place, panel, "minima", nth >> 1).zext(I32)
                zero = byte >> ((nth & 1) << 2).trunc(I32)
            zero = ((zero & 15) + (added - INT4_OFFSET)).to_float()
            return Scale(numbers(emit, place, panel, half), zero=zero)

        return scale

    return make


def _with_minimum(fields: Fields) -> ScaleOf:
    """Q4_1, Q5_1: an fp16 minimum beside an fp16 scale."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        minimum = fields.half_float(emit, place, panel, "minima")
        return Scale(fields.half_float(emit, place, panel, "scales"), minimum=minimum)

    return scale


def _e4m3_row(fields: Fields) -> ScaleOf:
    """NVFP4: E4M3 times the row's float32, rounded once."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        of_group = e4m3_to_float(fields.load(emit, place, panel, "scales", half))
        return Scale(of_group * fields.load(emit, place, panel, "factors").bits(F32))

    return scale


def _nth(place: Place, halves: int, half: int) -> Val:
    """Number of a group's half in its superblock, as a 32-bit number."""
    assert place.index is not None
    return (place.index * halves + half).trunc(I32)


def _bits(word: Val, shift: Val, count: int) -> Val:
    """`count` bits of each lane from bit `shift` on."""
    return (word >> shift) & ((1 << count) - 1)


def _q4_k(fields: Fields) -> ScaleOf:
    """Eight scales and eight minima of six bits: words of lower four bits, one of upper two."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        shift = _nth(place, 1, 0) << 2
        low_s, low_m, high = (fields.load(emit, place, panel, "scales", i) for i in range(3))
        s = _bits(low_s, shift, 4) | (_bits(high, shift, 2) << 4)
        m = _bits(low_m, shift, 4) | (_bits(high, shift + 2, 2) << 4)
        d, d_min = (fields.half_float(emit, place, panel, "factors", i) for i in range(2))
        return Scale(d * s.to_float(), minimum=-d_min * m.to_float())

    return scale


def _q2_k(fields: Fields) -> ScaleOf:
    """A byte for each half: scale in the lower nibble, minimum in the upper one."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        byte = fields.load(emit, place, panel, "scales", fields.element(place, half)).zext(I32)
        d, d_min = (fields.half_float(emit, place, panel, "factors", i) for i in range(2))
        return Scale(d * (byte & 15).to_float(), minimum=-d_min * (byte >> 4).to_float())

    return scale


def _q3_k(fields: Fields) -> ScaleOf:
    """Sixteen scales of six bits, less 32: two words of lower bits, one of upper ones."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        assert place.index is not None
        nth = _nth(place, 2, half)
        low = fields.load(emit, place, panel, "scales", place.index >> 2)
        high = fields.load(emit, place, panel, "scales", 2)
        s = _bits(low, (nth & 7) << 2, 4) | (_bits(high, nth << 1, 2) << 4)
        return Scale(fields.half_float(emit, place, panel, "factors") * (s - 32).to_float())

    return scale


def _iq4_xs(fields: Fields) -> ScaleOf:
    """Eight scales of six bits, less 32, in 16-bit words: two of lower bits, one of upper ones."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        assert place.index is not None
        nth = _nth(place, 1, 0)
        low = fields.load(emit, place, panel, "scales", place.index >> 2).zext(I32)
        high = fields.load(emit, place, panel, "scales", 2).zext(I32)
        s = _bits(low, (nth & 3) << 2, 4) | (_bits(high, nth << 1, 2) << 4)
        return Scale(fields.half_float(emit, place, panel, "factors") * (s - 32).to_float())

    return scale


def _q6_k(fields: Fields) -> ScaleOf:
    """A signed byte for each half."""

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        s = fields.load(emit, place, panel, "scales", fields.element(place, half)).sext(I32)
        return Scale(fields.half_float(emit, place, panel, "factors") * s.to_float())

    return scale


SCALINGS: Mapping[str, Callable[[Fields], ScaleOf]] = MappingProxyType(
    {
        "ue8m0": _power,
        "fp16": _plain,
        "bf16": _plain,
        "float32": _plain,
        "float32 block": _shared,
        "fp16, zero + 0": _with_zero(0),
        "fp16, zero + 1": _with_zero(1),
        "fp16, min": _with_minimum,
        "e4m3 * row": _e4m3_row,
        "q2_k": _q2_k,
        "q3_k": _q3_k,
        "q4_k": _q4_k,
        "q6_k": _q6_k,
        "iq4_xs": _iq4_xs,
    }
)
"""By `WeightFormat.scaling`."""

MINIMA = frozenset({"fp16, min", "q2_k", "q4_k"})
"""Those with minima."""
ZEROS = frozenset({"fp16, zero + 0", "fp16, zero + 1"})
"""Those with zero points."""


def scale_of(fmt: WeightFormat, layout: StripLayout) -> ScaleOf:
    """The function of a format's scaling, over strips of `layout`."""
    return SCALINGS[fmt.scaling](Fields(fmt, layout))
