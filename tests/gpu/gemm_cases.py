"""Random experts, tokens and tiles for the grouped GEMMs; what they give, in float64.

Whatever a kernel must not use is NaN: slots of nobody, rows of tokens in no tile, outputs before
they are written. Tiles that do not exist name a slot and pairs far outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.gpu_kernels import down, gate_up
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.fragments import permute, unpermute
from tests.cpu_kernels.cases import decode, from_bf16, to_bf16
from tests.gpu.harness import Report, simulate
from tests.gpu.slots import Slots, random_slots
from tests.reference import activation as activation_reference

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

FP32_ROUNDOFF, BF16_ROUNDOFF = 2.0**-24, 2.0**-8
BF16_NAN, OUTSIDE = 0xFFFF, 10**8
GPT_OSS = Activation(7.0, 1.702)


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        slots: of the experts; the last slot belongs to nobody.
        x: bf16 bits [T, H].
        slot_of_pair: int [T * k]; -1 where the pair is in no tile.
        k: experts of a token.
    """

    slots: Slots
    x: npt.NDArray[np.uint16]
    slot_of_pair: npt.NDArray[np.int64]
    k: int
    activation: Activation = GPT_OSS
    wide: bool = False

    @property
    def formats(self) -> LayerFormats:
        return self.slots.layout.formats

    @property
    def hot(self) -> Array:
        """The pairs that are in a tile."""
        return np.flatnonzero(self.slot_of_pair >= 0)


def random_case(
    fmt: WeightFormat | LayerFormats,
    H: int,
    I: int,
    *,
    tokens: int = 11,
    k: int = 2,
    slots: int = 3,
    parts: tuple[int, ...] = (1, 2),
    bias: bool = True,
    outliers: bool = False,
    activation: Activation = GPT_OSS,
    wide: bool = False,
    seed: int = 0,
) -> Case:
    """Standard normal x; with `outliers` 8 channels are 40 times as large. One token and some pairs
    of others are in no tile."""
    rng = np.random.default_rng(seed)
    packed = random_slots(fmt, H, I, slots + 1, parts=parts, bias=bias, seed=seed)
    packed.memory[slots] = 0xFF
    x = rng.standard_normal((tokens, H))
    if outliers:
        x[:, rng.choice(H, 8, replace=False)] *= 40
    of_pair = rng.integers(0, slots, (tokens, k))
    of_pair[rng.random((tokens, k)) < 0.1] = -1
    bits = to_bf16(x)
    if tokens > 1:
        of_pair[tokens // 2] = -1
        bits[tokens // 2] = BF16_NAN
    return Case(packed, bits, of_pair.reshape(-1), k, activation, wide)


def tiles_of(slot_of_pair: Sequence[int] | Array, tile: int) -> tuple[Array, Array, Array]:
    """tile_slot, tile_rows and num_tiles, as `pack` makes them, with one tile too many."""
    slots, rows = [], []
    for slot in sorted(set(slot_of_pair) - {-1}):
        pairs = np.flatnonzero(np.asarray(slot_of_pair) == slot)
        for first in range(0, len(pairs), tile):
            row = np.full(tile, -1, np.int32)
            some = pairs[first : first + tile]
            row[: len(some)] = some
            slots.append(slot)
            rows.append(row)
    count = np.array([len(slots)], np.int32)
    slots.append(OUTSIDE)
    rows.append(np.full(tile, OUTSIDE, np.int32))
    return np.array(slots, np.int32), np.stack(rows), count


def launch(
    case: Case,
    kernel: KernelDefinition,
    activations: Array,
    out: Array,
    tile: int,
    arch: str,
    seed: int | None = None,
    tiles: tuple[Array, Array, Array] | None = None,
) -> Report:
    """Run either kernel in the simulator."""
    layout = case.slots.layout
    first = kernel.name == "gate_up"
    table = layout.gate_up_table if first else layout.down_table
    wide = np.full(len(case.slots.memory), case.wide, np.int32)
    of_tile, rows, count = tiles or tiles_of(case.slot_of_pair, tile)
    strips = layout.intermediate // GROUP if first else -(-layout.hidden // STRIP_ROWS)
    config = kernel.config.gemm if first else kernel.config
    K, columns = layout.hidden, layout.intermediate
    if not first:
        K, columns = columns, K
    pointers = (case.slots.memory, table, wide, activations, of_tile, rows, count, out)
    scalars = (layout.nbytes, K, strips, columns, case.k if first else 1)
    grid = config.grid(strips, len(of_tile))
    return simulate(kernel, arch, grid, (*pointers, *scalars), seed=seed)


def run_gate_up(
    case: Case,
    tile: int,
    arch: str = "sm_80",
    seed: int | None = None,
    kernel: KernelDefinition | None = None,
) -> tuple[npt.NDArray[np.uint16], Report]:
    """h, bf16 bits [pairs, I] in the order of columns; NaN where nothing was written."""
    layout = case.slots.layout
    kernel = kernel or gate_up.choose(layout, case.activation, tile)
    h = np.full((len(case.slot_of_pair), layout.intermediate), BF16_NAN, np.uint16)
    x = np.ascontiguousarray(permute(case.x, case.formats.gate_up))
    report = launch(case, kernel, x, h, tile, arch, seed)
    columns: npt.NDArray[np.uint16] = unpermute(h, case.formats.down)
    return columns, report


def run_down(
    case: Case,
    h: npt.NDArray[np.uint16],
    tile: int,
    arch: str = "sm_80",
    seed: int | None = None,
    kernel: KernelDefinition | None = None,
) -> tuple[npt.NDArray[np.float32], Report]:
    """y, float32 [pairs, H], of h in the order of columns; NaN where nothing was written."""
    layout = case.slots.layout
    kernel = kernel or down.choose(layout, tile)
    y = np.full((len(h), layout.hidden), np.nan, np.float32)
    inputs = np.ascontiguousarray(permute(h, case.formats.down))
    report = launch(case, kernel, inputs, y, tile, arch, seed)
    return y, report


@dataclass(frozen=True)
class Expected:
    """Float64 values of pairs, and how far a correct kernel may be from each."""

    value: F64
    bound: F64

    def check(self, actual: Array) -> None:
        """Assert that `actual`, as float64, is within the bound of every element and, as a whole,
        within what docs/numerics.md allows."""
        assert np.isfinite(actual).all(), "a value is NaN or infinite, or was not written"
        error = np.abs(actual - self.value)
        worst = np.unravel_index(np.argmax(error / self.bound), error.shape)
        assert (error <= self.bound).all(), (
            f"at {tuple(map(int, worst))}: {actual[worst]} is not {self.value[worst]} "
            f"within {self.bound[worst]:.3g}"
        )
        assert np.linalg.norm(error) <= 0.0030 * np.linalg.norm(self.value)


def weights_and_parts(fmt: WeightFormat, matrix: Matrix) -> tuple[F64, F64]:
    """Weights, and the magnitudes of what is added up for each: of a code times its factor, and of
    an offset."""
    if fmt.name in DENSE_FORMATS:
        w = decode(fmt, matrix)
        return w, np.abs(w)
    w = matrix.dequantize(fmt).astype(np.float64)
    factors = fmt.factors
    offsets = None if factors is None else factors(matrix.planes)[1]
    if offsets is None or fmt.code.name == "int4":  # whose zero points are exact in the codes
        return w, np.abs(w)
    m = np.abs(np.repeat(offsets, fmt.group, axis=1))
    return w, np.abs(w - np.sign(offsets.repeat(fmt.group, axis=1)) * m) + m


def _product(fmt: WeightFormat, x: F64, matrix: Matrix) -> tuple[F64, F64]:
    """x W^T + b, and how far K additions of float32 may be from it (Higham 2002, section 3.1).

    Tensor cores align the products of a step before they add them, and drop what is below the
    largest one's last bit: a unit in the last place for each of K terms, twice what rounding costs.
    """
    w, parts = weights_and_parts(fmt, matrix)
    value, magnitude = x @ w.T, np.abs(x) @ parts.T
    if matrix.bias is not None:
        value, magnitude = value + matrix.bias, magnitude + np.abs(matrix.bias)
    return value, 2 * (x.shape[1] + 2) * FP32_ROUNDOFF * magnitude


def expected_h(case: Case) -> Expected:
    """h of the pairs in `case.hot`."""
    layout, alpha, limit = case.slots.layout, case.activation.alpha, case.activation.limit
    value, bound = np.zeros((2, len(case.slot_of_pair), layout.intermediate))
    for slot in set(case.slot_of_pair.tolist()) - {-1}:
        pairs = np.flatnonzero(case.slot_of_pair == slot)
        expert, x = case.slots.experts[slot], from_bf16(case.x[pairs // case.k])
        g, g_error = _product(case.formats.gate_up, x, expert.gate)
        u, u_error = _product(case.formats.gate_up, x, expert.up)
        h = activation_reference(g, u, limit, alpha)
        factor = np.abs(np.clip(u, -limit, limit) if limit else u) + (1 if alpha else 0)
        # 1.1 is the steepest that g * sigmoid(g) gets; a clamp makes no error larger
        error = 1.1 * g_error * (factor + u_error) + np.abs(g) * u_error + 2.0**-16 * np.abs(h)
        value[pairs] = h
        bound[pairs] = error + BF16_ROUNDOFF * (np.abs(h) + error)
    return Expected(value[case.hot], bound[case.hot])


def expected_y(case: Case, h: npt.NDArray[np.uint16]) -> Expected:
    """y of the pairs in `case.hot`."""
    value, bound = np.zeros((2, len(h), case.slots.layout.hidden))
    for slot in set(case.slot_of_pair.tolist()) - {-1}:
        pairs = np.flatnonzero(case.slot_of_pair == slot)
        down = case.slots.experts[slot].down
        value[pairs], bound[pairs] = _product(case.formats.down, from_bf16(h[pairs]), down)
    return Expected(value[case.hot], bound[case.hot])


def check_both(case: Case, tile: int, **how: Any) -> tuple[Array, Array]:
    """Run both kernels, each against float64 on its own input; h and y, all pairs."""
    cold = np.flatnonzero(case.slot_of_pair < 0)
    h, _ = run_gate_up(case, tile, **how)
    expected_h(case).check(from_bf16(h[case.hot]))
    assert (h[cold] == BF16_NAN).all(), "a row of a pair in no tile was written"
    y, _ = run_down(case, h, tile, **how)
    expected_y(case, h).check(y[case.hot].astype(np.float64))
    assert np.isnan(y[cold]).all(), "a row of a pair in no tile was written"
    return h, y
