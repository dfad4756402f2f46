"""The simulator on a kernel of CuTe DSL: it computes what it should, and breaking it is seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gpu.harness import Report, compiled, distinct_architectures, simulate
from tests.gpu.simulator import GlobalMemory, launch
from tests.gpu.staged_product import ProductConfig, definition

K, N, ROWS = 320, 64, 20
ARCH = "sm_80"
SEEDS = (None, 1, 2)


@dataclass
class Case:
    """One product and what it should be."""

    rows: Any = field(default_factory=lambda: np.random.default_rng(1).permutation(ROWS)[:16])

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.a = rng.standard_normal((ROWS, K)).astype(ml_dtypes.bfloat16)
        self.b = rng.standard_normal((N, K)).astype(ml_dtypes.bfloat16)
        self.rows = self.rows.astype(np.int32)
        self.c = np.full((16, N), np.nan, np.float32)

    def simulate(self, config: ProductConfig, arch: str = ARCH, seed: int | None = None) -> Report:
        values = {"a": self.a, "rows": self.rows, "b": self.b, "c": self.c, "K": K, "N": N}
        return simulate(definition(config), arch, (N // 16,), values, seed)

    def is_right(self) -> bool:
        exact = self.a[self.rows].astype(np.float64) @ self.b.astype(np.float64).T
        # K sums of magnitude below 64 are rounded to float32: 320 / 16 * 2^-18
        return bool(np.abs(self.c - exact).max() < 1e-4)


def run_text(ptx: str, case: Case, seed: int | None) -> None:
    """Runs the kernel's text after somebody changed it."""
    memory = GlobalMemory()
    arrays = {"a": case.a, "rows": case.rows, "b": case.b, "c": case.c}
    pointers = [memory.add(name, array) for name, array in arrays.items()]
    product = definition(ProductConfig())
    launch(
        ptx, (N // 16, 1, 1), product.pack([*pointers, K, N]), memory, product.shared_bytes, seed
    )


def without(text: str, instruction: str) -> str:
    lines = text.splitlines()
    kept = [line for line in lines if not line.strip().startswith(instruction)]
    assert len(kept) < len(lines)
    return "\n".join(kept)


def test_the_kernel_as_it_is() -> None:
    """On each architecture's text, in lockstep and in random schedules; no bank conflicts."""
    for arch in distinct_architectures(definition(ProductConfig()), ("sm_80", "sm_90", "sm_120")):
        for seed in SEEDS:
            case = Case()
            report = case.simulate(ProductConfig(), arch, seed)
            assert case.is_right(), (arch, seed)
            assert not report.bank_conflicts()


def test_traffic_of_the_kernel() -> None:
    """Each block reads the 16 rows of `a` once; all sectors are used fully."""
    case = Case()
    report = case.simulate(ProductConfig())
    assert report.reads["a"].bytes == N // 16 * 16 * 2 * K
    assert report.reads["a"].distinct_bytes == 16 * 2 * K
    assert all(access.efficiency == 1 for access in report.of("a", "cp"))
    assert report.of("a", "cp") and not report.of("a")


def test_a_removed_wait_is_seen() -> None:
    text = without(compiled(definition(ProductConfig()), ARCH).ptx, "cp.async.wait_group")
    case = Case()
    run_text(text, case, None)
    assert not case.is_right()


def test_a_wait_for_too_few_copies_is_seen() -> None:
    text = compiled(definition(ProductConfig()), ARCH).ptx
    case = Case()
    run_text(text.replace("cp.async.wait_group \t1", "cp.async.wait_group \t2"), case, None)
    assert not case.is_right()


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_removed_barrier_is_seen(seed: int) -> None:
    text = without(compiled(definition(ProductConfig()), ARCH).ptx, "bar.sync")
    case = Case()
    run_text(text, case, seed)
    assert not case.is_right()


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_copy_into_what_is_being_read_is_seen(seed: int) -> None:
    """With a place too few. A copy that lands at its wait, as in lockstep, hides that; under a seed
    half of them land at once."""
    case = Case()
    case.simulate(ProductConfig(places=2))
    assert case.is_right()
    case.simulate(ProductConfig(places=2), seed=seed)
    assert not case.is_right()


def test_a_wrong_swizzle_is_seen() -> None:
    """None at all has the right product and bank conflicts; one that differs between store and load
    has the wrong product."""
    case = Case()
    report = case.simulate(ProductConfig(stored=0, loaded=0))
    assert case.is_right()
    conflicts = report.bank_conflicts()
    assert conflicts and all(access.units == 8 * access.ideal for access in conflicts)
    case = Case()
    case.simulate(ProductConfig(stored=7, loaded=3))
    assert not case.is_right()


def test_a_lane_map_off_by_one_is_seen() -> None:
    case = Case()
    case.simulate(ProductConfig(shift=1))
    assert not case.is_right()


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_out_of_range_is_seen(row: int) -> None:
    rows = np.arange(16)
    rows[5] = row
    with pytest.raises(IndexError, match=r"out of bounds: 16 bytes at a.*cp\.async"):
        Case(rows).simulate(ProductConfig())


def test_values_are_checked() -> None:
    case = Case()
    with pytest.raises(ValueError, match="the kernel takes"):
        simulate(definition(ProductConfig()), ARCH, (1,), {"a": case.a})
    case.c = case.c.astype(np.float64)
    with pytest.raises(TypeError, match="c is float64; the kernel takes f32"):
        case.simulate(ProductConfig())
