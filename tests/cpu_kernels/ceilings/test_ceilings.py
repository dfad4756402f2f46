"""Ceilings: the loops do the work that is counted, and every format has one. No times."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.ceilings import bandwidth, peaks
from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe
from hybrid_moe.cpu_kernels.ceilings.peaks import MAC_OPS, USES, MacOp
from hybrid_moe.cpu_kernels.ceilings.probe import reader
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE, Tier, available_tiers
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes
from hybrid_moe.formats.table import DENSE_FORMATS

STEPS = 64
TIERS = [report.tier for report in available_tiers() if report.usable]
WITH_TILES = dataclasses.replace(PORTABLE, name="portable_tiles", tiles=True)
"""The generic lowering of tile ops runs anywhere."""


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_LEAST_BUFFER", 1 << 20)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda: 0)
    monkeypatch.setattr(bandwidth.ReadProbe.__init__, "__defaults__", (None, 64 << 10))


@pytest.mark.parametrize("prefetches", [False, True])
def test_reader_reads_every_word_of_its_blocks(prefetches: bool) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**31, 8 * 256, np.int64).astype(np.int32)
    arena = bandwidth.Arena(words.nbytes)
    arena.bytes[:] = words.view(np.uint8)
    blocks = np.array([5, 0, 3], np.int64)
    table = arena.address + 1024 * blocks
    out = np.zeros(16, np.int32)
    reader(prefetches)(table.ctypes.data, len(table), 1024, out.ctypes.data)
    expected = words.reshape(8, -1, 16)[blocks].astype(np.int64).sum(axis=(0, 1)).astype(np.int32)
    assert np.array_equal(out, expected)


def test_random_order_reads_the_same_blocks() -> None:
    probe = ReadProbe(1, nbytes=1 << 20, block=4096)
    (in_order,), (at_random,) = probe._in_order, probe._at_random
    assert len(in_order) == 256 and np.all(np.diff(in_order) == 4096)
    assert not np.array_equal(in_order, at_random)
    assert np.array_equal(in_order, np.sort(at_random))
    assert probe.measure(0.001) > 0 and probe.measure(0.001, at_random=True) > 0


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_loop_reads(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one never: not after the trial of both."""
    used: list[bool] = []
    monkeypatch.setattr(bandwidth, "reader", lambda prefetches: lambda *_: used.append(prefetches))
    monkeypatch.setattr(
        bandwidth, "repetitions_per_second",
        lambda config, repeat, seconds: (repeat(0), 2.0 if used[-1] == faster else 1.0)[1],
    )  # fmt: skip
    probe = ReadProbe(1, nbytes=1 << 20, block=4096)
    assert set(used) == {False, True} and probe.prefetches is faster
    used.clear()
    assert probe.measure(0.1) == 2.0 * (1 << 20) / 1e9
    assert used == [faster]


@pytest.mark.parametrize(("nbytes", "block"), [(4096, 8192), (1 << 20, 1000)])
def test_probe_refuses_sizes_that_it_cannot_read(nbytes: int, block: int) -> None:
    with pytest.raises(ValueError, match="block"):
        ReadProbe(1, nbytes=nbytes, block=block)


def test_shared_caches_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size) in enumerate((("1", "32K"), ("3", "16M"))):
            folder = tmp_path / "sys/devices/system/cpu" / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(text + "\n")
    monkeypatch.setattr(sysfiles, "ROOT", tmp_path)
    assert bandwidth.cache_bytes() == 32 << 20


def test_buffer_is_far_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_LEAST_BUFFER", 1 << 20)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda: 2 << 20)
    probe = ReadProbe(1, block=64 << 10)
    assert sum(arena.nbytes for arena in probe._arenas) == 8 << 20


@pytest.mark.parametrize("op", MAC_OPS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("tier", [*TIERS, WITH_TILES], ids=lambda tier: tier.name)
def test_peak_loops_multiply_as_often_as_is_counted(op: MacOp, tier: Tier) -> None:
    kernels = op.kernels(tier)
    assert kernels or not tier.tiles
    inputs = np.full(2048, op.pattern, np.int32)
    at = inputs.ctypes.data + -inputs.ctypes.data % 64
    for kernel in kernels:
        text = build_module([("peak", 4, kernel.body)], tier, kernel.label)
        address = compile_functions(text, tier.target, ["peak"], kernel.label)["peak"]
        out = np.zeros(kernel.out_bytes, np.uint8)
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
        call(at, at + 1024, STEPS, out.ctypes.data)
        # every product is 1, so the accumulators hold the count; a byte dot may keep 16-bit halves
        if "pair" in op.name:
            total = out.view(np.float32).sum(dtype=np.float64)
        elif "tile" in op.name:
            total = out.view(np.int32).sum(dtype=np.int64)
        elif "wide" in op.name:
            # activations are 0x0101 each, and no bias takes an offset of the weights back
            total = out.view(np.int32).sum(dtype=np.int64)
            assert total % 257 == 0
            total //= 257
            total //= 129 if total > STEPS * kernel.macs_per_step else 1
        else:
            total = out.view(np.int16).sum(dtype=np.int64)
        assert total == STEPS * kernel.macs_per_step


@pytest.mark.parametrize("op", MAC_OPS.values(), ids=lambda op: op.name)
def test_peak_is_none_only_where_the_tier_lacks_the_op(op: MacOp) -> None:
    peak = peaks.peak_macs(op, PoolConfig(1), PORTABLE, seconds=0.001)
    assert (peak is None) == op.name.startswith("tile")
    assert peak is None or peak > 0
    row = peaks.mac_ceilings(PORTABLE, op, 1, seconds=0.001)
    assert (row is None) == (peak is None)


@pytest.mark.parametrize(("threads", "expected"), [(1, 320_000), (96, 2_560_000)])
def test_calls_outlast_the_python_between_them(
    threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor of a nanosecond a step."""
    now = 0.0

    def call(steps: int, thread: int) -> None:
        nonlocal now
        now += 1e-9 * steps

    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now)
    assert peaks._enough_steps(call, threads) == expected


@pytest.mark.parametrize("method", DENSE_FORMATS)
def test_every_format_has_a_ceiling(method: str) -> None:
    assert all(use.op in MAC_OPS for use in USES[method])
    assert peaks.mac_ceiling(method, 1, PORTABLE, seconds=0.001) > 0


def test_ceiling_counts_the_products_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"byte_dot": 100.0, "pair_dot": 30.0, "tile_dot_bytes": None, "tile_dot_pairs": 80.0}
    monkeypatch.setattr(peaks, "peak_macs", lambda op, *rest: rates[op.name])
    assert peaks.mac_ceiling("MXFP4", 1, PORTABLE) == 50.0
    assert peaks.mac_ceiling("BF16", 1, PORTABLE) == 80.0
    row = peaks.mac_ceilings(PORTABLE, MAC_OPS["byte_dot"], 1)
    assert row is not None and row.formats["MXFP4"] == 50.0 / 1e9
    byte_dot = {m for m in DENSE_FORMATS if "byte_dot" in [use.op for use in USES[m]]}
    assert set(row.formats) == byte_dot


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="FP3"):
        peaks.mac_ceiling("FP3", 1)


def test_tiers_that_do_not_run_here_are_told() -> None:
    tiers, skipped = peaks.usable_tiers()
    reports = available_tiers()
    assert [t.name for t in tiers] == [r.tier.name for r in reports if r.usable]
    assert set(skipped) == {r.tier.name for r in reports if not r.usable} and all(skipped.values())
    assert [t.name for t in peaks.usable_tiers(["portable"])[0]] == ["portable"]
    with pytest.raises(ValueError, match="abacus"):
        peaks.usable_tiers(["abacus"])


@pytest.mark.usefixtures("small_buffers")
def test_places_cover_the_machine() -> None:
    places = bandwidth.read_places(1)
    assert list(places)[:2] == ["1 thread", "all threads"]
    assert len(places) == 2 + len(numa_nodes())
    row = bandwidth.read_ceiling("1 thread", places["1 thread"], seconds=0.006)
    assert row.where == "1 thread" and row.threads == 1
    assert row.in_order > 0 and row.at_random > 0
