"""Kernels that leave memory to the processor's prefetchers first meet the lines of a strip in
ascending order."""

from __future__ import annotations

from typing import Any

import pytest
from llvmlite import ir

from hybrid_moe.cpu_kernels.dsl.emit import I64, Emit, Val
from hybrid_moe.cpu_kernels.dsl.tiers import AVX2, AVX512_VBMI, Tier
from hybrid_moe.cpu_kernels.kernels import integer_dot, order
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.format_kernels import sums_integers
from hybrid_moe.cpu_kernels.kernels.group_dot import group_dot
from hybrid_moe.formats.strips import LINE
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import WeightFormat

Met = dict[str, list[int]]
"""Variable of a cursor -> bytes from its address to the vectors that are loaded, in order."""


def _is(value: Any, opname: str) -> bool:
    return isinstance(value, ir.Instruction) and bool(value.opname == opname)


def _offset(address: Any) -> tuple[Any, int]:
    """(what an address is computed from, the constants that are added)."""
    added = 0
    while _is(address, "add") and isinstance(address.operands[1], ir.Constant):
        added += address.operands[1].constant
        address = address.operands[0]
    return address, added


class _Recorder(Emit):
    """Emits as `Emit` does, and notes which vectors are loaded at a cursor's addresses."""

    def __init__(self, builder: ir.IRBuilder, tier: Tier) -> None:
        super().__init__(builder, tier)
        self.met: Met = {}

    def load(self, address: Val, element: ir.Type, lanes: int = 1, align: int = 1) -> Val:
        if lanes > 1:
            base, added = _offset(address.ir)
            if _is(base, "load"):  # of a variable
                self.met.setdefault(base.operands[0].name, []).append(added)
        return super().load(address, element, lanes, align)


def _lines(fmt: WeightFormat, tokens: int, tier: Tier) -> list[list[int]]:
    """Lines of a block's fields, if they lie in front of its codes, and of a group's codes, each in
    the order in which a kernel first meets them."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * DOT_ARITY)
    function = ir.Function(ir.Module(), kind, "kernel")
    emit = _Recorder(ir.IRBuilder(function.append_basic_block("entry")), tier)
    how = order.fixed15_order(tokens, tier.registers, tier.registers_per_panel)
    assert not how.prefetch, "it has prefetch instructions"
    body = group_dot(integer_dot.packed_source(fmt), tokens, how)
    body(emit, *[Val(emit, argument) for argument in function.args])
    layout = integer_dot.strip_of(fmt)
    # the fields of a single group lie behind its codes, and follow these
    end = layout.block_bytes if layout.fields_first else layout.code_bytes
    return [
        list(dict.fromkeys(offset // LINE for offset in offsets if offset < end))
        for offsets in emit.met.values()
    ]


@pytest.mark.parametrize(
    ("tier", "tokens"),
    [(AVX2, 1), (AVX512_VBMI, 1), (AVX512_VBMI, 2)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if sums_integers(f)], ids=lambda fmt: fmt.name
)
def test_lines_are_met_in_ascending_order(fmt: WeightFormat, tier: Tier, tokens: int) -> None:
    """All of them: fields in front of a block's codes before these, upper bits behind the rest."""
    layout = integer_dot.strip_of(fmt)
    *fields, codes = _lines(fmt, tokens, tier)
    assert codes == list(range(layout.code_bytes // LINE))
    expected = [list(range(layout.field_bytes // LINE))] if layout.fields_first else []
    assert fields == expected
