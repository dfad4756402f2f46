"""Dot kernels of INT8: a line of a strip is four inputs of 16 rows, multiplied as it is."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import I8, I16, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.group_dot import (
    GroupSums,
    Scale,
    Source,
    Weights,
    group_dot,
    panel_address,
)
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.strips import GROUP, PANELS, strip_layout

INT8_STRIP = strip_layout(INT8, GROUP)


def _weights(emit: Emit, group: Val, panel: Val | int, quad: int) -> Weights:
    at = panel_address(group, panel, 64) + 64 * PANELS * quad
    return [(quad, emit.load(at, I8, 64, align=64))]


def int8_scale(emit: Emit, group: Val, panel: Val | int) -> Scale:
    """16 fp16 behind the codes of the group."""
    at = panel_address(group, panel, 32) + INT8_STRIP.code_bytes
    return Scale(emit.op("half_to_float", emit.load(at, I16, 16, align=32)))


class _Wide(GroupSums):
    """One accumulator for each token, in whatever form the tier keeps it."""

    def __init__(self, emit: Emit, x: Sequence[Val]) -> None:
        super().__init__(emit, x)
        self._sums = [
            emit.op("wide_start", self.load(t, FIXED15_GROUP.low_bias, I32)) for t in range(len(x))
        ]

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        for quad, w in weights:
            for t in tokens:
                first, second = (
                    self.load(t, plane + 4 * quad, I32)
                    for plane in (FIXED15_GROUP.high, FIXED15_GROUP.low)
                )
                self._sums[t] = self.emit.op("wide_dot", self._sums[t], w, first, second)

    def total(self, token: int) -> Val:
        return self.emit.op("wide_total", self._sums[token])


_STRIP = Source(INT8_STRIP.group_bytes, INT8_STRIP.words, True, _weights, int8_scale, _Wide)


def int8_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel for T = `tokens`."""
    return group_dot(_STRIP, tokens, order)
