"""Lanes and warps together: divergence, barriers, schedules, shuffles, ldmatrix, mma."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gpu.snippets import run

Array = np.ndarray[Any, Any]
STORE = "mul.wide.u32 %rd7, %r0, 4; add.u64 %rd7, %rd7, %rd0; st.global.b32 [%rd7], %r9;"


def lanes(body: str, threads: int = 32, grid: int = 1, **more: Any) -> Array:
    """%r9 of every thread; of a grid, of the last block."""
    out = np.zeros(threads, np.uint32)
    run(body + STORE, out, threads=threads, grid=grid, **more)
    return out


def test_divergent_loops_meet_again() -> None:
    """Each lane counts to its own number; then all must be there for the vote."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r9, 0;
    $loop: setp.ge.u32 %p1, %r1, %r0; @%p1 bra $end;
    add.u32 %r9, %r9, %r1; add.u32 %r1, %r1, 1; bra.uni $loop;
    $end: vote.sync.ballot.b32 %r2, %p1, -1;
    setp.eq.u32 %p2, %r2, -1; @!%p2 mov.u32 %r9, 0;
    """
    for seed in (None, 1):
        got = lanes(body, threads=64, grid=3, seed=seed)
        assert got.tolist() == [i * (i - 1) // 2 for i in range(64)]


def test_both_sides_of_a_branch() -> None:
    body = """
    and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0;
    @%p1 bra $even; mov.u32 %r9, 7; bra $meet;
    $even: mov.u32 %r9, %r0;
    $meet: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    """
    assert lanes(body).tolist() == [i - 1 if i % 2 else 7 for i in range(32)]


def test_lanes_that_have_ended_leave_the_others_alone() -> None:
    """Of 8 blocks the last 6 end at once, and lanes above 40 of the others later."""
    body = """
    mov.u32 %r8, %ctaid.x; setp.gt.u32 %p1, %r8, 1; @%p1 ret;
    setp.gt.u32 %p2, %r0, 40; @%p2 bra $out;
    mov.u32 %r9, %r0; add.u32 %r9, %r9, %r8;
    mad.lo.u32 %r7, %r8, 64, %r0;
    mul.wide.u32 %rd7, %r7, 4; add.u64 %rd7, %rd7, %rd0; st.global.b32 [%rd7], %r9;
    $out: """
    out = np.zeros((8, 64), np.uint32)
    run(body, out, threads=64, grid=8)
    expected = np.zeros_like(out)
    for block in range(2):
        expected[block, :41] = np.arange(41) + block
    np.testing.assert_array_equal(out, expected)


def test_shuffles_need_their_lanes() -> None:
    with pytest.raises(RuntimeError, match=r"diverged.*shfl"):
        lanes("setp.lt.u32 %p1, %r0, 5; @%p1 shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;")
    got = lanes(
        "mov.u32 %r9, 9; setp.lt.u32 %p1, %r0, 4; @%p1 shfl.sync.idx.b32 %r9, %r0, 3, 31, 15;"
    )
    assert got.tolist() == [3] * 4 + [9] * 28


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX manual's pseudocode: source lane, and whether it is in range."""
    segment, clamp = c >> 8 & 31, c & 31
    last = (lane & segment) | (clamp & ~segment & 31)
    first = lane & segment
    if mode == "up":
        source, valid = lane - b, lane - b >= last
    elif mode == "down":
        source, valid = lane + b, lane + b <= last
    elif mode == "bfly":
        source, valid = lane ^ b, lane ^ b <= last
    else:
        source = first | (b & ~segment & 31)
        valid = source <= last
    return (source if valid else lane), valid


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
@pytest.mark.parametrize(("b", "c"), [(1, None), (5, None), (2, 0x1C03), (16, None), (3, 0x1807)])
def test_shuffles(mode: str, b: int, c: int | None) -> None:
    if c is None:
        c = 0 if mode == "up" else 31
    elif mode == "up":
        c &= ~31
    body = f"""mul.lo.u32 %r1, %r0, 3; shfl.sync.{mode}.b32 %r9|%p1, %r1, {b}, {c}, -1;
    @!%p1 add.u32 %r9, %r9, 1000;"""
    expected = [shuffled(mode, i % 32, b, c) for i in range(64)]
    assert lanes(body, threads=64).tolist() == [
        3 * (i // 32 * 32 + source) + (0 if valid else 1000)
        for i, (source, valid) in enumerate(expected)
    ]


def test_votes_and_reductions() -> None:
    odd = "and.b32 %r1, %r0, 1; setp.ne.u32 %p1, %r1, 0;"
    assert (lanes(odd + "vote.sync.ballot.b32 %r9, %p1, -1;") == 0xAAAAAAAA).all()
    for mode, value in {"any": 1, "all": 0, "uni": 0}.items():
        vote = f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;"
        assert (lanes(odd + vote) == value).all()
    got = lanes("shr.u32 %r1, %r0, 3; match.any.sync.b32 %r9, %r1, -1;")
    assert got.tolist() == [0xFF << i // 8 * 8 for i in range(32)]
    for name, value in {"add.s32": 496, "max.u32": 31, "min.s32": 0, "or.b32": 31}.items():
        assert (lanes(f"redux.sync.{name} %r9, %r0, -1;") == value).all()
    assert (lanes("activemask.b32 %r9;") == 0xFFFFFFFF).all()
    got = lanes("elect.sync %r1|%p1, -1; selp.b32 %r9, 9, %r1, %p1;", threads=64)
    assert got.tolist() == ([9] + [0] * 31) * 2


EXCHANGE = """
    shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r1, 124; xor.b32 %r2, %r2, 128; ld.shared.b32 %r9, [%r2];
"""


def test_barriers() -> None:
    """Warps exchange words through shared memory; named barriers do so for some of the warps."""
    expected = [i ^ 31 ^ 32 for i in range(64)]
    for barrier in ("bar.sync 0;", "barrier.sync 3, 64;"):
        for seed in (None, 1, 2):
            body = EXCHANGE.format(barrier=barrier)
            assert lanes(body, threads=64, grid=4, shared_bytes=256, seed=seed).tolist() == expected
    got = lanes(
        EXCHANGE.format(
            barrier="setp.ge.u32 %p1, %r0, 64; @%p1 bra $L2; bar.sync 1, 64; bra $L3;"
            "$L2: bar.sync 2, 64; $L3:"
        ),
        threads=128,
        shared_bytes=512,
        seed=3,
    )
    assert got.tolist() == [i ^ 31 ^ 32 for i in range(128)]


def test_a_missing_barrier_is_seen_under_a_seed() -> None:
    body = EXCHANGE.format(barrier="")
    expected = [i ^ 31 ^ 32 for i in range(64)]
    assert lanes(body, threads=64, shared_bytes=256).tolist() == expected  # in lockstep it is not
    for seed in range(4):
        got = lanes(body, threads=64, grid=4, shared_bytes=256, seed=seed)
        assert got.tolist() != expected


def test_a_barrier_that_some_never_reach_is_a_deadlock() -> None:
    for seed in (None, 1):
        with pytest.raises(RuntimeError, match=r"deadlock.*bar.sync"):
            lanes("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;", threads=64, seed=seed)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count: int, trans: str) -> None:
    """Lane l gets row l / 4, columns 2 (l % 4) and the next one, of each 8 x 8 matrix."""
    words = np.arange(256, dtype=np.uint16)  # row r of matrix j at 8 (8 j + r)
    out = np.zeros((32, count), np.uint32)
    targets = ", ".join(f"%r{20 + j}" for j in range(count))
    run(
        f"""shl.b32 %r1, %r0, 4; mul.wide.u32 %rd5, %r0, 16; add.u64 %rd5, %rd5, %rd1;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd5];
        st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{targets}}}, [%r1];
        mul.wide.u32 %rd6, %r0, {4 * count}; add.u64 %rd6, %rd6, %rd0;"""
        + "".join(f"st.global.b32 [%rd6+{4 * j}], %r{20 + j};" for j in range(count)),
        out,
        words,
        shared_bytes=512,
    )
    for lane in range(32):
        for j in range(count):
            for e in range(2):
                row, column = lane // 4, 2 * (lane % 4) + e
                at = (column, row) if trans else (row, column)
                assert out[lane, j] >> 16 * e & 0xFFFF == 64 * j + 8 * at[0] + at[1]


def test_mma() -> None:
    """Random fragments, placed as the PTX manual says, against a float64 product."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        group, in_group = lane >> 2, lane & 3
        halves: list[Any] = []
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            halves.append(a[row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)])
        for i in range(4):
            halves.append(b[in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group])
        words[lane, :6] = np.array(halves).view(np.uint32)
        for i in range(4):
            words[lane, 6 + i : 7 + i].view(np.float32)[:] = c[
                group + (8 if i >= 2 else 0), in_group * 2 + (i & 1)
            ]
    out = np.zeros((32, 4), np.float32)
    loads = "".join(f"ld.global.b32 %r{20 + i}, [%rd5+{4 * i}];" for i in range(10))
    run(
        f"""mul.wide.u32 %rd5, %r0, 40; add.u64 %rd5, %rd5, %rd1; {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r30, %r31, %r32, %r33}},
            {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {{%r26, %r27, %r28, %r29}};
        mul.wide.u32 %rd6, %r0, 16; add.u64 %rd6, %rd6, %rd0;
        st.global.v4.b32 [%rd6], {{%r30, %r31, %r32, %r33}};""",
        out,
        words,
    )
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i >= 2 else 0), (lane & 3) * 2 + (i & 1)
            assert out[lane, i] == pytest.approx(exact[row, column], rel=2.0**-23, abs=2.0**-23)


def test_mma_needs_the_whole_warp() -> None:
    with pytest.raises(RuntimeError, match="the warp has diverged"):
        lanes(
            "setp.lt.u32 %p1, %r0, 5; @%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1, %r2, %r3, %r4};"
        )
