"""Turns of loops, read from assembly: every form in which a compiler may write a loop."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

import pytest
from decode.instructions import ZEN3, ZEN4, Instruction, Limit, count, fewest_cycles

TRIPS = (10, 100, 1000)

# Each text marks its blocks with `movl $DEPTH`: how many loops the block is in.

DO_WHILE = """
	movl	$0, %eax
.LBB0_1:
	movl	$1, %eax
	jl	.LBB0_1
	movl	$0, %eax
	retq
"""

GUARDED = """
	movl	$0, %eax
	jle	.LBB0_3
	movl	$0, %ebx
.LBB0_2:
	movl	$1, %eax
	jl	.LBB0_2
.LBB0_3:
	movl	$0, %eax
	retq
"""

TEST_FIRST = """
.LBB0_1:
	movl	$1, %eax
	jge	.LBB0_3
	movl	$1, %ebx
	jmp	.LBB0_1
.LBB0_3:
	movl	$0, %eax
	retq
"""

JUMP_TO_THE_TEST = """
	movl	$0, %eax
	jmp	.LBB0_2
	.p2align	4
.LBB0_1:
	movl	$1, %eax
.LBB0_2:
	movl	$1, %ebx
	jl	.LBB0_1
	retq
"""

NESTED_DO_WHILE = """
.LBB0_1:
	movl	$1, %eax
.LBB0_2:
	movl	$2, %eax
.LBB0_3:
	movl	$3, %eax
	jl	.LBB0_3
	movl	$2, %ebx
	jl	.LBB0_2
	movl	$1, %ebx
	jl	.LBB0_1
	movl	$0, %eax
	retq
"""

END_BEFORE_BEGINNING = """
	movl	$0, %eax
	jle	.LBB0_5
	jmp	.LBB0_2
.LBB0_4:
	movl	$1, %eax
	jge	.LBB0_5
.LBB0_2:
	movl	$1, %ebx
.LBB0_3:
	movl	$2, %eax
	jl	.LBB0_3
	movl	$1, %ecx
	jmp	.LBB0_4
.LBB0_5:
	retq
"""

END_BEFORE_BEGINNING_TWICE = """
	movl	$0, %eax
	jle	.LBB0_8
	jmp	.LBB0_2
.LBB0_7:
	movl	$1, %eax
	jge	.LBB0_8
.LBB0_2:
	movl	$1, %ebx
	jmp	.LBB0_3
	.p2align	4
.LBB0_6:
	movl	$2, %eax
	jge	.LBB0_7
.LBB0_3:
	movl	$2, %ebx
	jle	.LBB0_6
	movl	$2, %ecx
.LBB0_5:
	movl	$3, %eax
	jl	.LBB0_5
	jmp	.LBB0_6
.LBB0_8:
	movl	$0, %ebx
	retq
"""

ONE_AFTER_THE_OTHER = """
.LBB0_1:
	movl	$1, %eax
	jl	.LBB0_1
	movl	$0, %eax
.LBB0_2:
	movl	$1, %ebx
	jl	.LBB0_2
	retq
"""

TWO_INSIDE_ONE = """
.LBB0_1:
	movl	$1, %eax
.LBB0_2:
	movl	$2, %eax
	jl	.LBB0_2
	movl	$1, %ebx
	jmp	.LBB0_4
.LBB0_3:
	movl	$2, %ebx
.LBB0_4:
	movl	$2, %ecx
	jl	.LBB0_3
	movl	$1, %ecx
	jl	.LBB0_1
	retq
"""

BRANCH_INSIDE = """
.LBB0_1:
	movl	$1, %eax
	je	.LBB0_3
	movl	$1, %ebx
	jmp	.LBB0_4
.LBB0_3:
	movl	$1, %ecx
.LBB0_4:
	movl	$1, %edx
	jl	.LBB0_1
	retq
"""

LEFT_FROM_INSIDE = """
.LBB0_1:
	movl	$1, %eax
.LBB0_2:
	movl	$2, %eax
	je	.LBB0_4
	movl	$2, %ebx
	jl	.LBB0_2
	movl	$1, %ebx
	jl	.LBB0_1
.LBB0_4:
	movl	$0, %eax
	retq
"""

ENTERED_AT_TWO_PLACES = """
	movl	$0, %eax
	je	.LBB0_2
.LBB0_1:
	movl	$1, %eax
.LBB0_2:
	movl	$1, %ebx
	jl	.LBB0_1
	retq
"""

NO_LOOP = """
	movl	$0, %eax
	je	.LBB0_1
	movl	$0, %ebx
	jmp	memset
.LBB0_1:
	ud2
"""

FORMS = {name: text for name, text in globals().items() if name.isupper() and "movl" in str(text)}


def _function(body: str) -> str:
    """The body between another function and what follows it."""
    other = "g:\n.LBB9_1:\n\tjl\t.LBB9_1\n\tretq\n.Lfunc_end9:\n"
    return f"{other}f:                                      # @f{body}.Lfunc_end0:\n{other}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_loop(form: str) -> None:
    marks = Counter(int(depth) for depth in re.findall(r"movl\s+\$(\d)", FORMS[form]))
    found: Counter[int] = Counter()
    for instruction, times in count(_function(FORMS[form]), "f", TRIPS).items():
        if instruction.mnemonic == "movl":
            found[int(instruction.operands[1])] += times
    assert found == {depth: n * math.prod(TRIPS[:depth]) for depth, n in marks.items()}


def test_blocks_that_nothing_leads_to_do_not_count() -> None:
    counts = count(_function("\n\tjmp\t.LBB0_2\n\tincq\t%rax\n.LBB0_2:\n\tretq\n"), "f", ())
    assert {i.mnemonic: n for i, n in counts.items()} == {"jmp": 1, "retq": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (NESTED_DO_WHILE, "a loop 3 deep; trips has 2"),
        (  # the inner and the outer loop begin with the same instruction
            "\n.LBB0_1:\n\tincq\t%rax\n\tjl\t.LBB0_1\n\tincq\t%rbx\n\tjl\t.LBB0_1\n\tretq\n",
            "ends in blocks",
        ),
        ("\n\tjmpq\t*%rax\n", "where does jmpq"),
    ],
    ids=["deeper", "two loops with one beginning", "address in a register"],
)
def test_what_cannot_be_told_is_refused(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        count(_function(body), "f", TRIPS[:2])


@pytest.mark.parametrize(
    ("text", "mnemonic", "operands"),
    [
        ("\t{vex}\tvpdpbusd\t(%rsi), %ymm1, %ymm0", "vpdpbusd", "(%rsi), %ymm1, %ymm0"),
        ("\tvpdpbusd\t(%rsi){1to16}, %zmm1, %zmm0", "vpdpbusd", "(%rsi){1to16}, %zmm1, %zmm0"),
        ("\taddq\t$64, %r14                     # comment", "addq", "$64, %r14"),
        ("\tvzeroupper", "vzeroupper", ""),
    ],
)
def test_lines_are_read(text: str, mnemonic: str, operands: str) -> None:
    counts = count(_function(f"\n{text}\n\tretq\n"), "f", ())
    assert counts[Instruction(mnemonic, operands)] == 1


@pytest.mark.parametrize(
    ("text", "load", "work"),
    [
        ("vpaddd (%rsi), %ymm0, %ymm0", True, True),
        ("vpbroadcastd 4(%rax,%r13), %ymm9", True, False),
        ("vpbroadcastd %xmm1, %ymm9", False, True),
        ("vmovdqa %ymm0, 32(%rdi)", False, False),
        ("vmovups %zmm0, 32(%rdi) {%k1}", False, False),
        ("vmovups 32(%rdi), %zmm0 {%k1} {z}", True, False),
        ("leaq (%rdx,%rdx,2), %rdx", False, False),
        ("prefetcht0 4096(%r12,%r8)", True, False),
        ("addq $64, %r14", False, False),
    ],
)
def test_what_an_instruction_needs(text: str, load: bool, work: bool) -> None:
    instruction = Instruction(*text.split(" ", 1))
    assert (instruction.is_load, instruction.is_vector_work) == (load, work)


@pytest.mark.parametrize(
    ("mnemonic", "operands", "limit", "cycles"),
    [
        ("vpdpbusd", "%ymm1, %ymm2, %ymm3", "multiply", 0.5),
        ("vpdpbusd", "%zmm1, %zmm2, %zmm3", "multiply", 1),
        ("vpdpbusd", "(%rsi){1to16}, %zmm2, %zmm3", "multiply", 1),  # its load is a small one
        ("vpbroadcastd", "(%rsi), %zmm3", "load", 0.5),
        ("vmovdqa64", "(%rsi), %zmm3", "load", 1),
        ("vpandq", "%zmm1, %zmm2, %zmm3", "vector pipes", 0.5),
        ("vpermb", "%zmm1, %zmm2, %zmm3", "shuffle", 1),
        ("vpsrld", "$4, %zmm2, %zmm3", "shift, float add, convert", 1),
        ("addq", "$64, %rsi", "dispatch", 1 / 6),
    ],
)
def test_a_vector_of_64_bytes_takes_a_pipe_for_two_cycles(
    mnemonic: str, operands: str, limit: str, cycles: float
) -> None:
    counts = Counter({Instruction(mnemonic, operands): 1})
    assert fewest_cycles(counts, ZEN4) == (limit, cycles)


def test_shifts_share_other_pipes_on_zen_3() -> None:
    def busiest(core: Mapping[str, Limit]) -> float:
        some = (
            Instruction("vpsrld", "$4, %ymm2, %ymm3"),
            Instruction("vpshufb", "%ymm1, %ymm2, %ymm3"),
        )
        return fewest_cycles(Counter(some), core)[1]

    assert (busiest(ZEN3), busiest(ZEN4)) == (1, 0.5)
