"""Memory of the simulator: bounds, alignment, poison, asynchronous copies, what requests cost."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.simulator import GlobalMemory
from tests.gpu.simulator.memory import BASE
from tests.gpu.snippets import run

ADDRESS = """
    mul.lo.u32 %r1, %r0, {size};
    cvt.u64.u32 %rd5, %r1;
    add.u64 %rd5, %rd5, %rd0;
    add.u64 %rd6, %rd1, %rd5;
    sub.u64 %rd6, %rd6, %rd0;
"""


@pytest.mark.parametrize(
    ("kind", "words"),
    [(f"b{bits}", words) for bits in (8, 16, 32, 64) for words in (1, 2, 4) if bits * words <= 128],
)
def test_vector_copies(kind: str, words: int) -> None:
    """Loads and stores of every width move all bytes, in order."""
    bits = int(kind[1:])
    size = bits // 8 * words
    prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    names = ", ".join(f"{prefix}{10 + i}" for i in range(words))
    op, operand = (f".v{words}.{kind}", f"{{{names}}}") if words > 1 else (f".{kind}", names)
    source = np.random.default_rng(0).integers(0, 256, 64 * size, np.uint8)
    target = np.zeros_like(source)
    run(
        ADDRESS.format(size=size)
        + f"ld.global.nc.L1::no_allocate{op} {operand}, [%rd5]; st.global{op} [%rd6], {operand};",
        source,
        target,
        threads=64,
    )
    np.testing.assert_array_equal(target, source)


def test_signed_bytes_are_extended() -> None:
    source, target = np.array([-3, 100], np.int8), np.zeros(2, np.int32)
    run(
        "ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0];st.global.v2.b32 [%rd1], {%r1, %r2};",
        source,
        target,
    )
    assert target.tolist() == [-3, 253]


@pytest.mark.parametrize("offset", [-4, 128, 4096])
@pytest.mark.parametrize(
    "access",
    ["ld.global.b32 %r9, [%rd5];", "st.global.b32 [%rd5], %r9;", "red.global.add.u32 [%rd5], %r9;"],
)
def test_out_of_bounds(access: str, offset: int) -> None:
    """One lane in front of an array, behind it, and far from it."""
    inside = np.zeros(32, np.uint32)
    body = ADDRESS.format(size=4) + "setp.ne.u32 %p1, %r0, 7; @%p1 bra $L1; "
    body += f"add.s64 %rd5, %rd0, {offset}; $L1: {access}"
    with pytest.raises(IndexError, match=r"out of bounds: 4 bytes at p0.*which has 128; line"):
        run(body, inside, np.zeros(32, np.uint32))


def test_out_of_bounds_in_lanes_that_are_off() -> None:
    target = np.zeros(20, np.uint32)
    run(
        ADDRESS.format(size=4) + "setp.lt.u32 %p1, %r0, 20; @%p1 st.global.b32 [%rd5], %r0;",
        target,
        target.copy(),
    )
    assert target.tolist() == list(range(20))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_misaligned(space: str) -> None:
    base = "%rd5" if space == "global" else "%r1"
    with pytest.raises(ValueError, match="misaligned: 8 bytes"):
        run(
            ADDRESS.format(size=4) + f"ld.{space}.v2.b32 {{%r2, %r3}}, [{base}];",
            np.zeros(64, np.uint32),
            np.zeros(64, np.uint32),
            shared_bytes=256,
        )


def test_out_of_bounds_in_shared_memory() -> None:
    """Shared memory ends where the launch says, not where the next block's begins."""
    body = "shl.b32 %r1, %r0, 2; st.shared.b32 [%r1+{offset}], %r0;"
    run(body.format(offset=0), np.zeros(1), shared_bytes=128, grid=2)
    with pytest.raises(IndexError, match="out of bounds: 4 bytes at 128 of shared memory"):
        run(body.format(offset=4), np.zeros(1), shared_bytes=128, grid=2)


def test_dynamic_shared_memory_lies_behind_the_fixed_one() -> None:
    target = np.zeros(2, np.uint32)
    body = """mov.u32 %r1, fixed; mov.u32 %r2, smem; st.shared.b32 [%r1+16], 5;
    st.shared.b32 [%r2], 7; ld.shared.b32 %r3, [fixed+16]; ld.shared.b32 %r4, [smem];
    st.global.v2.b32 [%rd0], {%r3, %r4};"""
    run(body, target, shared_bytes=16, fixed_bytes=20)
    assert target.tolist() == [5, 7]
    with pytest.raises(IndexError, match="which has 48"):
        run(body.replace("[smem]", "[smem+16]"), target, shared_bytes=16, fixed_bytes=20)


def test_what_nobody_wrote_is_poison() -> None:
    """NaN in shared memory and in registers."""
    target = np.zeros(3, np.float32)
    run(
        "mov.u32 %r1, smem; ld.shared.b32 %r2, [%r1]; add.f32 %r4, %r3, 0f3F800000;"
        "mov.b32 %r5, %r6; st.global.b32 [%rd0], %r2; st.global.b32 [%rd0+4], %r4;"
        "st.global.b32 [%rd0+8], %r5;",
        target,
        shared_bytes=16,
    )
    assert np.isnan(target).all()
    assert (target.view(np.int32) > 1 << 24).all()  # nor is it a plausible index


def test_64_bit_offsets() -> None:
    """Arrays of more than 4 GiB are addressable, and untouched memory costs nothing."""
    big, target = np.zeros((1 << 30) + 64, np.uint32), np.zeros(1, np.uint32)
    big[1 << 30] = 77
    run(
        "mov.u64 %rd5, 4; shl.b64 %rd5, %rd5, 30; add.u64 %rd5, %rd5, %rd0;"
        "ld.global.b32 %r1, [%rd5]; st.global.b32 [%rd1], %r1;",
        big,
        target,
    )
    assert target[0] == 77


COPY = """
    shl.b32 %r1, %r0, 4; mul.wide.u32 %rd5, %r0, 16; add.u64 %rd5, %rd5, %rd0;
    mul.wide.u32 %rd6, %r0, 4; add.u64 %rd6, %rd6, %rd1;
    cp.async.cg.shared.global [%r1], [%rd5], 16{size}; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+512], [%rd5+8], 8; cp.async.commit_group;
    {wait}
    ld.shared.b32 %r2, [%r1]; ld.shared.b32 %r3, [%r1+{second}]; add.u32 %r4, %r2, %r3;
    st.global.b32 [%rd6], %r4;
"""


def copies(wait: str, size: str = "", second: int = 516) -> np.ndarray:
    source, target = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    run(COPY.format(wait=wait, size=size, second=second), source, target, shared_bytes=1024)
    return target


def test_asynchronous_copies_land_at_their_wait() -> None:
    first = np.arange(128, dtype=np.uint32)[::4]
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        np.testing.assert_array_equal(copies(wait), first + first + 3)
    poison = np.uint32(0x7FFF7FFF)
    np.testing.assert_array_equal(copies("cp.async.wait_group 1;"), first + poison)
    np.testing.assert_array_equal(copies(""), np.full(32, poison + poison))


def test_asynchronous_copies_fill_with_zeros() -> None:
    """Of 16 bytes that a copy writes it may read fewer, or none: not even the address counts."""
    wait = "cp.async.wait_all;"
    first = np.arange(128, dtype=np.uint32)[::4]
    np.testing.assert_array_equal(copies(wait, ", 4", 4), first)
    np.testing.assert_array_equal(copies(wait, ", 8", 4), 2 * first + 1)
    np.testing.assert_array_equal(copies(wait, ", 0", 4), np.zeros(32))


def test_atomics() -> None:
    counter, old = np.zeros(4, np.uint32), np.zeros(64, np.uint32)
    total = np.zeros(1, np.float32)
    run(
        "mul.wide.u32 %rd5, %r0, 4; add.u64 %rd5, %rd5, %rd1;"
        "atom.global.add.u32 %r1, [%rd0], 1; st.global.b32 [%rd5], %r1;"
        "red.global.max.u32 [%rd0+4], %r0; atom.global.cas.b32 %r2, [%rd0+8], 0, 9;"
        "atom.global.exch.b32 %r3, [%rd0+12], 5; red.global.add.f32 [%rd2], 0f3F800000;",
        counter,
        old,
        total,
        threads=64,
    )
    assert counter.tolist() == [64, 63, 9, 5]
    assert sorted(old.tolist()) == list(range(64))
    assert total[0] == 64


def test_sectors_are_counted() -> None:
    """A request of 32 lanes: 16 bytes each beside one another, then every fourth word, then the
    same word for all."""
    source = np.zeros(1024, np.uint32)
    for stride, size, sectors, ideal, lines in (
        (16, 16, 16, 16, 4),
        (16, 4, 16, 4, 4),
        (0, 4, 1, 1, 1),
    ):
        load = "ld.global.b32 %r9, [%rd5];"
        if size == 16:
            load = "ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd5];"
        lint = run(ADDRESS.format(size=stride) + load, source, np.zeros(1, np.uint32), grid=3)
        (access,) = lint.accesses.values()
        assert (access.requests, access.units, access.ideal) == (3, 3 * sectors, 3 * ideal)
        assert access.lines == 3 * lines


def test_requests_that_cross_lines_are_counted() -> None:
    """512 bytes from the middle of a line touch five lines, and as many sectors as before."""
    lint = run(
        ADDRESS.format(size=16) + "ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd5+64];",
        np.zeros(1024, np.uint32),
        np.zeros(1, np.uint32),
    )
    (access,) = lint.accesses.values()
    assert (access.units, access.ideal, access.lines, access.ideal_lines) == (16, 16, 5, 4)


def test_traffic_tells_repeated_reads_from_distinct_ones() -> None:
    memory = GlobalMemory()
    assert memory.add("a", np.zeros(5, np.uint8)) == BASE
    source = np.zeros(256, np.uint32)
    lint = run(
        ADDRESS.format(size=4) + "ld.global.b32 %r6, [%rd5]; ld.global.b32 %r7, [%rd5+64];",
        source,
        np.zeros(1, np.uint32),
        grid=2,
    )
    assert sum(access.units for access in lint.accesses.values()) == 16
    traffic = lint.reads()["p0"]
    assert (traffic.requests, traffic.sectors, traffic.distinct_sectors) == (4, 16, 6)


@pytest.mark.parametrize(
    ("address", "size", "wavefronts", "ideal"),
    [
        ("shl.b32 %r1, %r0, 2;", 4, 1, 1),  # a word a bank
        ("shl.b32 %r1, %r0, 3;", 4, 2, 1),  # every second bank
        ("shl.b32 %r1, %r0, 7;", 4, 32, 1),  # one bank
        ("mov.u32 %r1, 0;", 4, 1, 1),  # one word for all
        ("shl.b32 %r1, %r0, 4;", 16, 4, 4),
        ("shl.b32 %r1, %r0, 6;", 16, 16, 4),  # 64 bytes apart: half of the banks unused, 4 each
        ("shl.b32 %r1, %r0, 3;", 8, 2, 2),
    ],
)
def test_bank_conflicts_are_counted(address: str, size: int, wavefronts: int, ideal: int) -> None:
    loads = {
        4: "ld.shared.b32 %r4, [%r1];",
        8: "ld.shared.v2.b32 {%r4, %r5}, [%r1];",
        16: "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];",
    }
    lint = run(address + loads[size], np.zeros(1), shared_bytes=4096)
    (access,) = lint.accesses.values()
    assert (access.units, access.ideal) == (wavefronts, ideal)
