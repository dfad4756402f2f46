"""The derivation of the decode kernel: every step is right, and its instructions are counted."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import steps
from decode.derivation import (
    CODE_BYTES,
    GROUPS,
    KERNEL,
    STEPS,
    STRIP,
    STRIP_BYTES,
    K,
    Layout,
    Step,
    direct,
    unpacked,
)
from decode.instructions import Instruction, fewest_cycles
from decode.sweeps import Clock, Problem, Runner, step_runner

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, choose_tier
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import PANELS, STRIP_ROWS, strip_layout
from hybrid_moe.formats.tensors import Matrix

LINES_OF_CODES = CODE_BYTES // 64
"""Of a group."""

LAYOUTS = tuple({step.layout: None for step in STEPS.values()})

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(1, tokens=6, layouts=LAYOUTS)


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_a_step_gives_the_exact_sums(step: Step, problem: Problem) -> None:
    tier = choose_tier()
    if step.x86 and "avx2" not in tier.all_features:
        pytest.skip("names an instruction of AVX2")
    step_runner(step, problem, tier).check()


@pytest.mark.parametrize(
    ("most", "body"),
    [(3, direct(6, 3)), (1, direct(6, 1)), (2, unpacked(6, 2, 16)), (3, unpacked(6, 3, 7))],
)
def test_tokens_share_a_strip(most: int, body: steps.Body, problem: Problem) -> None:
    Runner(body, problem, choose_tier(), tokens=6, tile=most).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_weight_is_found(layout: Layout, problem: Problem) -> None:
    step = next(s for s in STEPS.values() if s.layout == layout)
    runner = step_runner(step, problem, choose_tier())
    memory = problem.memory[layout].bytes
    memory[5] ^= 4
    try:
        with pytest.raises(SystemExit, match="differ from float64"):
            runner.check()
    finally:
        memory[5] ^= 4
    runner.check()


def test_the_kernel_reads_the_library_s_layout() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (STRIP_ROWS, K // 2), np.uint8)
    scales = rng.integers(0, 255, (STRIP_ROWS, GROUPS), np.uint8)
    packed = Arena(STRIP_BYTES)
    pack_rows(packed.address, range(1), strip_layout(MXFP4, K), Matrix(codes, scales), STRIP_ROWS)
    assert np.array_equal(STRIP.pack(codes, scales), packed.bytes)


def test_sums_are_integers_that_float32_holds(problem: Problem) -> None:
    """What makes bit equality fair: quarters of sums below 2^22."""
    assert np.array_equal(problem.exact * 4, np.round(problem.exact * 4))
    assert np.abs(problem.exact).max() < 2**22


X86_TIERS = [t.name for t in TIERS.values() if t.machine != "aarch64"]


@X86
@pytest.mark.parametrize("name", [n for n in X86_TIERS if "avx2" in TIERS[n].all_features])
@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_the_turns_of_a_step_are_right(step: Step, name: str) -> None:
    """Every step reads every line of codes once and finds 128 weights in it, whatever its loops
    look like: two lookups for each register of codes, or without lookups a float of each weight."""
    tier = TIERS[name]
    lines = GROUPS * LINES_OF_CODES * step.strips
    counts = steps.step_counts(step, tier)
    if "lookup16" in step.without:
        converted = sum(n for i, n in counts.items() if i.mnemonic.endswith("cvtdq2ps"))
        assert converted == lines * 128 // (tier.vector_bits // 32)
        return
    lookups = sum(n for i, n in counts.items() if _is_lookup(i))
    assert lookups == (lines + step.lines_twice) * 2 * tier.registers_per_panel


def _is_lookup(instruction: Instruction) -> bool:
    """A shuffle whose table is the second operand; others have a fixed control in its place."""
    if instruction.mnemonic == "vpermb":
        return True
    return instruction.mnemonic == "vpshufb" and not instruction.operands.startswith(".LCPI")


@X86
def test_the_kernel_multiplies_as_often_as_derived() -> None:
    """For 128 weights of 2 planes AVX2 needs 8 multiplications of 32 bytes, VNNI half as many."""
    lines = GROUPS * LINES_OF_CODES
    counted = {
        tier: sum(n for i, n in steps.step_counts(KERNEL, TIERS[tier]).items()
                  if i.mnemonic == name) / lines
        for tier, name in (
            ("avx2", "vpmaddubsw"), ("avx2_vnni", "vpdpbusd"), ("avx512_vnni", "vpdpbusd"),
        )
    }  # fmt: skip
    assert counted == {"avx2": 8, "avx2_vnni": 8, "avx512_vnni": 4}
    limit, cycles = fewest_cycles(steps.step_counts(KERNEL, TIERS["avx2"]))
    assert limit == "vector pipes" and cycles > 4 * lines


@X86
@pytest.mark.parametrize("name", X86_TIERS)
def test_the_turns_of_a_tile_are_right(name: str) -> None:
    """Every token's sums of a group are converted once, whatever the loops look like."""
    tier = TIERS[name]
    tokens, counts = steps.tile_counts(tier)
    conversions = sum(n for i, n in counts.items() if i.mnemonic.endswith("cvtdq2ps"))
    assert conversions == tokens * PANELS * tier.registers_per_panel * GROUPS


def test_a_clock_counts_what_it_runs() -> None:
    """64 dependent additions a turn, none of them combined: the last sum tells how many."""
    clock = Clock(choose_tier())
    rate = clock.measure(turns=1000)
    assert np.isfinite(rate) and rate > 0
    assert clock._out[0] == 1000 + 64 * 1000 * 1000


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "TOKENS", (1, 3))
    monkeypatch.setattr(steps, "_TURNS", 1)
    out = tmp_path / "steps.json"
    arguments = ["--mib", "1", "--rounds", "1", "--json", str(out), "--parts", "steps,tokens,tiers"]
    monkeypatch.setattr("sys.argv", ["steps.py", *arguments])
    steps.main()
    document = json.loads(out.read_text())
    points = [p for p in document["points"] if p["part"] == "steps"]
    tier = choose_tier()
    runnable = [s for s in STEPS.values() if not s.x86 or "avx2" in tier.all_features]
    assert document["bench"] == "steps" and document["isa"] == tier.name
    assert [p["step"] for p in points] == [s.name for s in runnable]
    # at the very least a load and two lookups for every register of codes
    assert all(p["GBps"] > 0 and p["instructions"] > 3 * tier.registers_per_panel for p in points)


def test_unknown_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["steps.py", "--mib", "1", "--parts", "step"])
    with pytest.raises(SystemExit, match="there are steps, tokens"):
        steps.main()
