"""Tile ops and the kernels made of them, as AMX instructions and in the generic lowering."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl import amx as lowering
from hybrid_moe.cpu_kernels.dsl import tiers
from hybrid_moe.cpu_kernels.dsl.emit import Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.dsl.tiles import (
    TILE_OPS,
    TileConfig,
    Tiles,
    TileShape,
    configure,
    release,
)
from hybrid_moe.cpu_kernels.jit.compile import Target, assembly
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import functions_of, kernel_set
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import round_up
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.amx import (
    MNEMONICS,
    Emulator,
    add_rounded_once,
    emulator,
    replace_instructions,
    tdpbf16ps,
    tdpbssd,
)
from tests.cpu_kernels.cases import Array, Case, random_batch
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.test_emulation import EDGE_FLOATS
from tests.cpu_kernels.toolbox import aligned, compile_kernel

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
Lowered = pytest.mark.parametrize("tier", ["generic", "emulated"])

_SHAPES = st.sampled_from(  # M, K in 32-bit words, N
    [(16, 16, 16), (16, 8, 16), (1, 1, 1), (3, 5, 7), (13, 16, 2), (16, 2, 16), (1, 16, 16)]
)


def _config(M: int, words: int, N: int) -> TileConfig:
    """Register 0 is C, 1 is A, 2 is B."""
    shapes = (TileShape(M, 4 * N), TileShape(M, 4 * words), TileShape(words, 4 * N))
    return TileConfig(shapes + (TileShape(),) * 5)


def _dot(config: TileConfig, kind: str) -> KernelBody:
    """Kernel (c, a, b): c += a x b through registers; rows are 64 bytes apart."""

    def body(emit: Emit, c: Val, a: Val, b: Val) -> None:
        tiles = Tiles(emit, config)
        for n, address in enumerate((c, a, b)):
            tiles.load(n, address, emit.i64(64))
        getattr(tiles, kind)(0, 1, 2)
        tiles.store(0, c, emit.i64(64))

    return body


def _tier(name: str) -> tiers.Tier:
    return RUNNABLE["amx"] if name == "emulated" else RUNNABLE["portable"]


@functools.lru_cache(maxsize=512)
def _compiled(kind: str, shape: tuple[int, int, int], tier: str) -> tuple[Callable[..., None], ...]:
    config, target = _config(*shape), _tier(tier)
    return (
        compile_kernel(configure(config), 0, target),
        compile_kernel(_dot(config, kind), 3, target),
        compile_kernel(release, 0, target),
    )


def _run(kind: str, tier: str, c: Array, a: Array, b: Array) -> Array:
    """c [M, N] 32-bit, a [M, words] 32-bit, b [words, N] 32-bit; returns C."""
    padded = []
    for matrix in (c, a, b):
        memory = aligned((16, 16), np.int32, fill=0xAA)
        memory[: matrix.shape[0], : matrix.shape[1]] = matrix
        padded.append(memory)
    enter, dot, leave = _compiled(kind, (c.shape[0], a.shape[1], c.shape[1]), tier)
    enter()
    dot(*padded)
    leave()
    beyond = padded[0].copy()
    beyond[: c.shape[0], : c.shape[1]] = np.int32(-0x55555556)
    assert (beyond == np.int32(-0x55555556)).all(), "a store stays within the register's shape"
    return padded[0][: c.shape[0], : c.shape[1]].copy()


@Lowered
@given(shape=_SHAPES, seed=st.integers(0, 2**32 - 1))
def test_dot_bytes_is_exact(tier: str, shape: tuple[int, int, int], seed: int) -> None:
    M, words, N = shape
    rng = np.random.default_rng(seed)
    ends = np.array([-128, 127, 0, -1], np.int8)
    a, b = (
        np.where(rng.random((rows, 4 * columns)) < 0.3, rng.choice(ends), rng.integers(-128, 128))
        .astype(np.int8)
        .view(np.int32)
        for rows, columns in ((M, words), (words, N))
    )
    c = rng.integers(-(2**31), 2**31, (M, N)).astype(np.int32)
    got = _run("dot_bytes", tier, c, a, b)
    left, right = a.view(np.int8), b.view(np.int8).reshape(words, N, 4)
    meaning = TILE_OPS["tile_dot_bytes"].meaning
    assert meaning is not None
    assert np.array_equal(got, meaning(c.astype(np.int64), left, right).astype(np.int32))
    assert np.array_equal(got, tdpbssd(c, left, right))


def _widen(words: Array) -> Array:
    """32-bit words [R, C] -> float32 [R, 2 C] of their bf16."""
    return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


@Lowered
@given(shape=_SHAPES, seed=st.integers(0, 2**32 - 1))
def test_dot_pairs_of_normal_values(tier: str, shape: tuple[int, int, int], seed: int) -> None:
    M, words, N = shape
    rng = np.random.default_rng(seed)

    def pairs(rows: int, columns: int) -> Array:
        values = rng.standard_normal((rows, 2 * columns)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int32)

    a, b = pairs(M, words), pairs(words, N)
    c = rng.standard_normal((M, N)).astype(np.float32)
    got = _run("dot_pairs", tier, c.view(np.int32), a, b).view(np.float32)
    meaning = TILE_OPS["tile_dot_pairs"].meaning
    assert meaning is not None
    assert np.array_equal(got, meaning(c, _widen(a), _widen(b).reshape(words, N, 2)))


@given(shape=_SHAPES, seed=st.integers(0, 2**32 - 1))
def test_dot_pairs_of_any_bits_as_the_instruction(shape: tuple[int, int, int], seed: int) -> None:
    """What reaches the emulator is what was stored: subnormals, infinities, NaN."""
    M, words, N = shape
    rng = np.random.default_rng(seed)
    a = rng.integers(-(2**31), 2**31, (M, words)).astype(np.int32)
    b = rng.integers(-(2**31), 2**31, (words, N)).astype(np.int32)
    c = rng.choice(EDGE_FLOATS, (M, N)).astype(np.float32)
    got = _run("dot_pairs", "emulated", c.view(np.int32), a, b).view(np.float32)
    with np.errstate(all="ignore"):
        expected = tdpbf16ps(c, _widen(a), _widen(b).reshape(words, N, 2))
    same = (got.view(np.int32) == expected.view(np.int32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all()


@Lowered
@pytest.mark.parametrize(
    ("old", "a", "b", "exact"),
    [
        (0.0, 2.0**-127, 2.0**9, 2.0**-118),
        (0.0, 2.0**9, -(2.0**-130), -(2.0**-121)),
        (0.0, 2.0**-100, 2.0**-27, 2.0**-127),
        (2.0**-126, 2.0**-100, -1.25 * 2.0**-26, -(2.0**-128)),
        (2.0**-128, 0.0, 0.0, 2.0**-128),
    ],
    ids=["left", "right", "product", "sum", "accumulator"],
)
def test_a_tier_says_whether_its_dot_pairs_flushes(
    tier: str, old: float, a: float, b: float, exact: float
) -> None:
    left, right = (
        np.array([[value]], np.float32).view(np.int32) >> 16 & 0xFFFF for value in (a, b)
    )
    accumulator = np.array([[old]], np.float32).view(np.int32)
    got = _run("dot_pairs", tier, accumulator, left, right).view(np.float32)
    assert got.tolist() == [[0.0 if _tier(tier).flushes("tile_dot_pairs") else exact]]


@given(seed=st.integers(0, 2**32 - 1))
def test_the_emulator_rounds_once(seed: int) -> None:
    """Sums that need more bits than float64 has: 64 are enough for these exponents."""
    rng = np.random.default_rng(seed)
    product = rng.integers(-(2**16), 2**16, 64) * 2.0 ** rng.integers(-20, 20, 64)
    total = (rng.integers(-(2**24), 2**24, 64) * 2.0 ** rng.integers(-20, 20, 64)).astype("f4")
    total[:32] = (product[:32] * 2.0**24).astype(np.float32)  # near ties of float32
    exact = product.astype(np.longdouble) + total
    assert np.array_equal(add_rounded_once(total, product), exact.astype(np.float32))


@pytest.mark.parametrize(
    "shapes",
    [
        (TileShape(),) * 7,
        (TileShape(17, 64),) * 8,
        (TileShape(16, 65),) * 8,
        (TileShape(0, 64),) * 8,
    ],
)
def test_config_refuses(shapes: tuple[TileShape, ...]) -> None:
    with pytest.raises(ValueError, match=r"16 rows of 64|8 shapes"):
        TileConfig(shapes)


# The emulation would notice.


def test_the_emulator_refuses_what_a_processor_would() -> None:
    machine = Emulator()
    machine._execute(MNEMONICS.index("tilezero"), 0, 0, 0)
    palette = aligned((64,), np.uint8)
    palette[:] = np.frombuffer(_config(16, 8, 16).palette, np.uint8)
    configure_, dot = MNEMONICS.index("ldtilecfg"), MNEMONICS.index("tdpbssd")
    machine._execute(configure_, palette.ctypes.data, 0, 0)
    machine._execute(configure_, palette.ctypes.data, 0, 0)
    machine._execute(dot, 0, 0, 0 | 2 << 8 | 1 << 16)  # A and B exchanged
    machine._execute(dot, 0, 0, 0 | 1 << 8 | 2 << 16)
    assert [error.split()[0] for error in machine.errors] == ["tilezero", "ldtilecfg", "tdpbssd"]


def test_unknown_instructions_are_not_skipped() -> None:
    with pytest.raises(NotImplementedError, match="tdpbuud"):
        replace_instructions("\ttdpbuud\t%tmm2, %tmm1, %tmm0\n", 256)


# Whole layers.


Emulated = pytest.mark.skipif(
    RUNNABLE["amx"] is TIERS["amx"], reason="this processor has AMX: nothing is emulated"
)


@Emulated
@Formats
@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_configures_each_thread_once(fmt: WeightFormat, threads: int) -> None:
    if threads > usable_cores():
        pytest.skip("needs two cores")
    case = Case.random(fmt, 64, 96, E=3)
    layer = case.layer(RUNNABLE["amx"], PoolConfig(threads))
    control = group_for(PoolConfig(threads)).control
    patience, control.timeout_ns = control.timeout_ns, 10**12
    try:  # a caller leaves the job now and then to see signals: not while we count
        for _ in range(3):
            before = emulator().executed.copy()
            layer.forward(*random_batch(40, 64, case.E, 2))
            executed = emulator().executed - before
            assert 1 <= executed["ldtilecfg"] <= threads
    finally:
        control.timeout_ns = patience
    layer.close()


def _expected(fmt: WeightFormat, sizes: Sequence[int], groups: int, strips: int) -> Counter[str]:
    """Instructions of tiles of `sizes` tokens, of `strips` that have `groups` in all, one chunk
    each."""
    counts: Counter[str] = Counter()
    for size in sizes:
        blocks = round_up(size, 16) // 16
        if fmt is not BF16:  # a group: A of two planes, B of four panels; C, a plane of a panel
            counts += Counter(tileloadd=(2 + 4) * groups, tdpbssd=2 * 4 * groups)
            counts += Counter(tilezero=2 * 4 * groups, tilestored=2 * 4 * groups)
        else:  # A again for each pair of panels, B once; C stays over the groups of a strip
            counts += Counter(tileloadd=(blocks * blocks + 4) * groups)
            counts += Counter(tdpbf16ps=blocks * 4 * groups)
            counts += Counter(tilezero=blocks * 4 * strips, tilestored=blocks * 4 * strips)
    return counts


@Emulated
@Formats
@pytest.mark.parametrize("tokens", [1, 6, 7, 16, 17, 33])
def test_tiles_do_all_of_the_work(fmt: WeightFormat, tokens: int) -> None:
    """One expert, so that instructions can be counted."""
    H, I = 64, 96
    kernels = kernel_set(fmt.name, RUNNABLE["amx"])
    layer = Case.random(fmt, H, I, E=1).layer(RUNNABLE["amx"])
    x, ids, weights = random_batch(tokens, H, 1, 1)
    before = emulator().executed.copy()
    layer.forward(x, ids, weights)
    executed = emulator().executed - before
    executed -= Counter(ldtilecfg=executed["ldtilecfg"], tilerelease=executed["tilerelease"])
    gate_up, down = I // 32, H // 64  # strips
    if tokens >= format_kernels(fmt).tile.from_tokens:
        groups = gate_up * (H // 32) + down * (I // 32)
        assert executed == _expected(fmt, kernels.tiled.sizes(tokens), groups, gate_up + down)
    else:
        assert not executed
    layer.close()


# What LLVM makes of them for a processor that has AMX.

_TARGETS = {"tier": TIERS["amx"].target, "sapphirerapids": Target("sapphirerapids")}
"""As the library compiles for the tier, and as LLVM does for its first processor."""


@functools.cache
def _golden(format_name: str, target: str, kind: str = "", bits: int = 16) -> dict[str, list[str]]:
    """Kernel -> its instructions, of those whose name begins with `kind`; activations of `bits`."""
    functions_ = functions_of(format_name, TIERS["amx"], bits)
    chosen = [one for one in functions_ if one[0].startswith(kind)]
    text = build_module(chosen, TIERS["amx"], "golden")
    functions: dict[str, list[str]] = {}
    for line in assembly(text, _TARGETS[target]).splitlines():
        label = re.match(r"^(\w+):", line)
        if label and not line.startswith("."):
            functions[label[1]] = []
        elif re.match(r"^\t[a-z]", line) and functions:
            list(functions.values())[-1].append(line.strip())
    return functions


def _count(instructions: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, line)) for line in instructions)


@Formats
def test_assembly_configures_in_one_kernel(fmt: WeightFormat) -> None:
    functions = _golden(fmt.name, "sapphirerapids")
    for mnemonic, where in (("ldtilecfg", "enter"), ("tilerelease", "leave")):
        found = {name: _count(code, mnemonic) for name, code in functions.items()}
        assert found.pop(where) == 1
        assert not any(found.values())


@pytest.mark.parametrize(
    ("fmt", "kernel", "bits", "expected"),
    [
        # a group: two planes meet four panels. A is loaded once, B once, C is new each time.
        (
            "MXFP4", "block16", 16,
            {"tdpbssd": 2 * 4, "tileloadd": 2 + 4, "tilezero": 2 * 4, "tilestored": 2 * 4,
             "prefetcht0": 4096 // 32 // 64},
        ),
        # the same from packed codes, all of whose lines are asked for
        (
            "INT8", "block16", 16,
            {"tdpbssd": 2 * 4, "tileloadd": 2 + 4, "tilezero": 2 * 4, "tilestored": 2 * 4,
             "prefetcht0": 34},
        ),
        # 8-bit activations have one plane, and all four panels are under way
        (
            "INT8_ROW_FLOAT32", "block16", 8,
            {"tdpbssd": 4, "tileloadd": 1 + 4, "tilezero": 4, "tilestored": 4, "prefetcht0": 32},
        ),
        (
            "INT4_ROW_FLOAT32", "block16", 8,
            {"tdpbssd": 4, "tileloadd": 1 + 4, "tilezero": 4, "tilestored": 4,
             "prefetcht0": 4096 // 32 // 64},
        ),
        # halves of a group have products, and loads, of their own
        (
            "NVFP4", "block16", 16,
            {"tdpbssd": 16, "tileloadd": 2 * (2 + 4), "tilezero": 16, "tilestored": 16,
             "prefetcht0": 4096 // 32 // 64},
        ),
        # 16 tokens meet four panels: a load of A, of each B, and of each C of earlier chunks
        (
            "BF16", "block16", 16,
            {"tdpbf16ps": 4, "tileloadd": 1 + 4 + 4, "tilezero": 4, "tilestored": 4,
             "prefetcht0": 4096 // 64},
        ),
        # twice, two times 16 tokens meet two panels; only the first asks for lines
        (
            "BF16", "block32", 16,
            {"tdpbf16ps": 2 * 4, "tileloadd": 2 * (2 + 2 + 4), "tilezero": 2 * 4,
             "tilestored": 2 * 4, "prefetcht0": 4096 // 64},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", _TARGETS)
def test_assembly_counts(
    fmt: str, kernel: str, bits: int, expected: dict[str, int], target: str
) -> None:
    code = _golden(fmt, target, "block", bits)[kernel]
    counted = (*MNEMONICS, "prefetcht0")
    assert Counter(m for line in code if (m := line.split()[0]) in counted) == expected
    assert not [line for line in code if re.match(r"v.*\(%rsp\)", line)], (
        "a vector register is spilled"
    )


def test_vector_code_is_that_of_its_row() -> None:
    """VPERMB looks codes up; powers are multiplied, as VSCALEFPS takes the same ports there."""
    for name, code in _golden(MXFP4.name, "sapphirerapids").items():
        decodes = bool(re.match("unpack|direct", name))
        assert bool(_count(code, "vpermb")) == decodes, name
        assert not (decodes and _count(code, "vpshufb"))
        assert not _count(code, "vscalefps")


# Permission.


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_need_the_systems_permission(
    granted: bool, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("isa"):
        pytest.skip("--isa answers in the processor's place")
    features = dict.fromkeys(TIERS["amx"].all_features, True)
    monkeypatch.setattr(tiers.llvm, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(lowering, "permitted", lambda: granted)
    monkeypatch.delenv("HYBRID_MOE_ISA", raising=False)
    tiers.host_features.cache_clear()
    try:
        assert tiers.choose_tier().name == ("amx" if granted else "avx512_vbmi")
    finally:
        tiers.host_features.cache_clear()


def test_permission_is_asked_of_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel or processor without AMX refuses, and that is said once."""
    lowering.permitted.cache_clear()
    answers = {lowering.permitted() for _ in range(3)}
    assert len(answers) == 1
    assert len(caplog.records) == int(answers == {False})
    lowering.permitted.cache_clear()
