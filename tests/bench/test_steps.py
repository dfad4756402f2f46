"""The derivation of the decode kernel: every step is right, and its instructions are counted."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import steps
from derivation import KERNEL, STEPS, Step, direct, unpacked
from instructions import Instruction, count, fewest_cycles
from sweeps import GROUPS, Clock, Problem, Runner, step_runner

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, choose_tier

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(1, tokens=6)


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_a_step_gives_the_exact_sums(step: Step, problem: Problem) -> None:
    tier = choose_tier()
    if step.x86 and "avx2" not in tier.all_features:
        pytest.skip("names an instruction of AVX2")
    step_runner(step, problem, tier).check()


@pytest.mark.parametrize(
    "body", [direct(6, 3), direct(6, 1), unpacked(6, 2, 16), unpacked(6, 3, 7)]
)
def test_tokens_share_a_strip(body: steps.Body, problem: Problem) -> None:
    Runner(body, problem, choose_tier(), tokens=6).check()


@pytest.mark.parametrize("name", ["rows", "panels"])
def test_a_wrong_weight_is_found(name: str, problem: Problem) -> None:
    runner = step_runner(next(s for s in STEPS.values() if s.by_rows == (name == "rows")), problem,
                         choose_tier())  # fmt: skip
    memory = problem.keep[name == "panels"].bytes
    memory[5] ^= 4
    try:
        with pytest.raises(SystemExit, match="differ from float64"):
            runner.check()
    finally:
        memory[5] ^= 4
    runner.check()


def test_sums_are_integers_that_float32_holds(problem: Problem) -> None:
    """What makes bit equality fair: quarters of sums below 2^22."""
    assert np.array_equal(problem.exact * 4, np.round(problem.exact * 4))
    assert np.abs(problem.exact).max() < 2**22


LOOPS = """
f:
	movq	%rdi, %rax
	testq	%rax, %rax
	jle	.LBB0_5
	jmp	.LBB0_2
.LBB0_4:
	incq	%rdx
	cmpq	%rcx, %rdx
	jge	.LBB0_5
.LBB0_2:
	vpxor	%ymm0, %ymm0, %ymm0
.LBB0_3:
	vpaddd	(%rsi), %ymm0, %ymm0
	prefetcht0	4096(%rsi)
	cmpq	%rsi, %r8
	jl	.LBB0_3
	vmovdqa	%ymm0, (%rdi)
	jmp	.LBB0_4
.LBB0_5:
	retq
.Lfunc_end0:
"""


def test_loops_are_counted_with_their_turns() -> None:
    """The outer loop's end stands before its beginning, as LLVM likes to place it."""
    counts = count(LOOPS, "f", (10, 100))
    by_name = {i.mnemonic: n for i, n in counts.items() if i.mnemonic not in ("cmpq", "jmp")}
    assert by_name == {
        "movq": 1, "testq": 1, "jle": 1, "retq": 1,
        "incq": 10, "jge": 10, "vpxor": 10, "vmovdqa": 10,
        "vpaddd": 1000, "prefetcht0": 1000, "jl": 1000,
    }  # fmt: skip
    with pytest.raises(ValueError, match="2 deep"):
        count(LOOPS, "f", (10,))


@pytest.mark.parametrize(
    ("text", "load", "work"),
    [
        ("vpaddd (%rsi), %ymm0, %ymm0", True, True),
        ("vpbroadcastd 4(%rax,%r13), %ymm9", True, False),
        ("vpbroadcastd %xmm1, %ymm9", False, True),
        ("vmovdqa %ymm0, 32(%rdi)", False, False),
        ("leaq (%rdx,%rdx,2), %rdx", False, False),
        ("prefetcht0 4096(%r12,%r8)", True, False),
        ("addq $64, %r14", False, False),
    ],
)
def test_what_an_instruction_needs(text: str, load: bool, work: bool) -> None:
    instruction = Instruction(*text.split(" ", 1))
    assert (instruction.is_load, instruction.is_vector_work) == (load, work)


@X86
def test_the_kernel_multiplies_as_often_as_derived() -> None:
    """For 128 weights of 2 planes AVX2 needs 8 multiplications of 32 bytes, VNNI half as many."""
    lines = GROUPS * 8  # of codes
    counted = {
        name: sum(n for i, n in steps.step_counts(KERNEL, TIERS[tier]).items()
                  if i.mnemonic == name) / lines
        for tier, name in (("avx2", "vpmaddubsw"), ("avx512_vnni", "vpdpbusd"))
    }  # fmt: skip
    assert counted == {"vpmaddubsw": 8, "vpdpbusd": 4}
    limit, cycles = fewest_cycles(steps.step_counts(KERNEL, TIERS["avx2"]))
    assert limit == "vector pipes" and cycles > 4 * lines


@X86
@pytest.mark.parametrize("name", [t.name for t in TIERS.values() if t.machine != "aarch64"])
def test_the_turns_of_a_tile_are_right(name: str) -> None:
    """Every token's sums of a group are converted once, whatever the loops look like."""
    tier = TIERS[name]
    tokens, counts = steps.tile_counts(tier)
    conversions = sum(n for i, n in counts.items() if i.mnemonic.endswith("cvtdq2ps"))
    assert conversions == tokens * 2 * tier.registers_per_panel * GROUPS


def test_a_clock_ticks() -> None:
    assert Clock(choose_tier()).measure(turns=1000) > 1e7


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "TOKENS", (1, 3))
    monkeypatch.setattr(steps, "_TURNS", 1)
    out = tmp_path / "steps.json"
    arguments = ["--mib", "1", "--rounds", "1", "--json", str(out), "--parts", "steps,tokens,tiers"]
    monkeypatch.setattr("sys.argv", ["steps.py", *arguments])
    steps.main()
    document = json.loads(out.read_text())
    points = [p for p in document["points"] if p["part"] == "steps"]
    assert document["bench"] == "steps" and len(points) >= 6
    assert all(p["GBps"] > 0 and p["instructions"] > 1 for p in points)


def test_unknown_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["steps.py", "--mib", "1", "--parts", "step"])
    with pytest.raises(SystemExit, match="there are steps, tokens"):
        steps.main()
