"""The emulator is right: IR bodies against NumPy models, and against the processor if it can."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val, build_module, vector
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE, TIERS, host_features
from hybrid_moe.cpu_kernels.jit.compile import Target, compile_functions
from tests.cpu_kernels.emulation import INSTRUCTIONS, PREFIX, Instruction, emulated, rewriter
from tests.cpu_kernels.models import MODELS, Array
from tests.cpu_kernels.toolbox import callable_at

_ELEMENTS = {
    "i8": (I8, np.uint8),
    "i16": (I16, np.int16),
    "i32": (I32, np.int32),
    "float": (F32, np.float32),
}
_ROUNDS = 400

EDGE_FLOATS = np.array(
    [0, -0.0, 1, -1, 2.0**-126, -(2.0**-126), 2.0**-149, 2.0**-127, 2.0**127, 3.4e38, -3.4e38,
     np.inf, -np.inf, np.nan, 1 + 2.0**-7, 2.0**-63, 2.0**-64, 2.0**-75, 1.17549421e-38],
    np.float32,
)  # fmt: skip


def _shape(kind: str) -> tuple[int, str]:
    match = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    assert match
    return int(match[1]), match[2]


def _vectors(instruction: Instruction) -> tuple[str, ...]:
    """The types of the operands that are not constants."""
    return instruction.operands[: len(instruction.operands) - len(instruction.immediates)]


def _call_of(instruction: Instruction, how: str) -> Callable[..., None]:
    """Kernel (operands..., out): one call of the instruction."""

    def body(emit: Emit, *addresses: Val) -> None:
        operands = []
        for address, kind in zip(addresses[:-1], _vectors(instruction), strict=True):
            n, element = _shape(kind)
            operands.append(emit.load(address, _ELEMENTS[element][0], n))
        scalars = instruction.operands[len(operands) :]
        for kind, value in zip(scalars, instruction.immediates, strict=True):
            operands.append(emit.splat(value, _ELEMENTS[kind][0]))
        n, element = _shape(instruction.result)
        kind = vector(_ELEMENTS[element][0], n)
        emit.store(addresses[-1], emit.intrinsic(instruction.intrinsic, kind, *operands))

    arity = len(_vectors(instruction)) + 1
    text = build_module([("kernel", arity, body)], PORTABLE, "instruction")
    target = Target("", ",".join(f"+{f}" for f in sorted(instruction.features | {"avx512f"})))
    if how != "processor":
        text = rewriter(lambda _: True)(text)
        assert f'call {instruction.result} @"{PREFIX}' in text
        target = emulated(PORTABLE, features=frozenset() if how == "bare" else None).target
    return callable_at(compile_functions(text, target, ["kernel"], "instruction")["kernel"], arity)


def _random_operand(kind: str, mnemonic: str, round_: int, rng: np.random.Generator) -> Array:
    """Random bits, or values at the edges of the type, or both mixed."""
    n, element = _shape(kind)
    dtype = np.dtype(_ELEMENTS[element][1])
    bits = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(dtype)
    if mnemonic == "vdpbf16ps":
        if element == "float":
            near = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(np.float32)
            choices = [bits, rng.choice(EDGE_FLOATS, n), near]
        else:
            halves = (rng.choice(EDGE_FLOATS, 2 * n).view(np.uint32) >> 16).astype(np.uint16)
            wide = rng.standard_normal(2 * n) * 2.0 ** rng.integers(-20, 20, 2 * n)
            near16 = (wide.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            choices = [bits, halves.view(np.int32), near16.view(np.int32)]
        return choices[round_ % 3] if round_ % 4 else np.choose(rng.integers(0, 3, n), choices)
    if element == "float":
        whole = rng.integers(-300, 301, n).astype(np.float32)
        choices = [bits, rng.choice(EDGE_FLOATS, n), whole, rng.standard_normal(n).astype("f4")]
        return np.choose(rng.integers(0, 4, n), choices)
    limits = [0, 1, 127, 128, 255] if element == "i8" else [0, 1, -1, 32767, -32768]
    edges = rng.choice(
        np.array(limits, np.uint8 if element == "i8" else np.int16),
        n * dtype.itemsize // (1 if element == "i8" else 2),
    )
    return np.where(rng.random(n) < (round_ % 3) / 2, edges.view(dtype), bits)


def _same(got: Array, expected: Array) -> bool:
    """Equal bits; any NaN equals any NaN (payloads differ between orders of operands)."""
    if got.dtype == np.float32:
        both_nan = np.isnan(got) & np.isnan(expected)
        return bool((both_nan | (got.view(np.uint32) == expected.view(np.uint32))).all())
    return np.array_equal(got, expected)


@pytest.mark.parametrize("how", ["emulated", "bare", "processor"])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_equals_its_model(name: str, how: str) -> None:
    instruction = INSTRUCTIONS[name]
    if how == "processor" and not instruction.features <= host_features():
        pytest.skip(f"this processor has no {instruction.mnemonic} of this width")
    call = _call_of(instruction, how)
    n, element = _shape(instruction.result)
    rng = np.random.default_rng(7)
    for round_ in range(_ROUNDS):
        operands = [
            _random_operand(kind, instruction.mnemonic, round_, rng)
            for kind in _vectors(instruction)
        ]
        out = np.zeros(n, _ELEMENTS[element][1])
        call(*operands, out)
        expected = MODELS[instruction.mnemonic](*operands)
        assert _same(out, expected), (operands, out, expected)


def test_models_saturate_wrap_and_flush() -> None:
    """Each rule that sets an instruction apart, by hand."""
    ones = np.full(32, 255, np.uint8)
    assert MODELS["vpmaddubsw"](ones, np.full(32, 128, np.uint8)).tolist() == [-32768] * 16
    assert MODELS["vpmaddubsw"](ones, np.full(32, 127, np.uint8)).tolist() == [32767] * 16
    low = np.full(16, -32768, np.int16)
    assert MODELS["vpmaddwd"](low, low).tolist() == [-(2**31)] * 8
    top = np.full(16, 2**31 - 1, np.int32)
    one = np.full(16, 1, np.int32)
    assert MODELS["vpdpbusd"](top, one, one).tolist() == [-(2**31)] * 16
    table = np.arange(32, dtype=np.uint8)
    assert MODELS["vpshufb"](table, np.full(32, 0x8F, np.uint8)).tolist() == [0] * 32
    assert MODELS["vpshufb"](table, np.full(32, 0x7F, np.uint8)).tolist() == [15] * 16 + [31] * 16

    assert MODELS["vpermb"](np.arange(64, dtype=np.uint8), np.full(64, 0xC5, np.uint8)).max() == 5
    scaled = MODELS["vscalefps"](np.full(4, 3, np.float32), *np.array([[1.9], [0]], np.float32))
    assert scaled.tolist() == [6] * 4, "the exponent is rounded down"
    tiny = np.array([2.0**-126 * 1.75], np.float32)
    assert MODELS["vscalefps"](tiny, np.array([-22], np.float32), tiny)[0] == 2.0**-147

    def dot(acc: float, w: tuple[float, float], x: tuple[float, float]) -> float:
        def pair(values: tuple[float, float]) -> Array:
            return (
                (np.array(values, np.float32).view(np.uint32) >> 16)
                .astype(np.uint16)
                .view(np.int32)
            )

        return float(MODELS["vdpbf16ps"](np.array([acc], np.float32), pair(w), pair(x))[0])

    assert dot(0, (2.0**-127, 2.0**-127), (1, 1)) == 0.0, "subnormal inputs are zero"
    assert dot(0, (2.0**-100, 0), (2.0**-27, 0)) == 0.0, "subnormal results are zero"
    assert dot(2.0**-127, (0, 0), (0, 0)) == 0.0, "a subnormal accumulator is zero"
    least = 2.0**-126
    assert dot(least, (2.0**-100, 0), (-(2.0**-50), 0)) == 0.0, "2^-126 - 2^-150 has 24 bits"
    assert dot(least, (2.0**-100, 0), (-(2.0**-51), 0)) == least, "half a unit less rounds up"
    assert dot(least, (2.0**-100, 0), (-1.5 * 2.0**-51, 0)) == 0.0
    # the odd product first: (2^24 - 2^24) + 1 = 1, the other order would lose the 1
    assert dot(2.0**24, (1, -(2.0**24)), (1, 1)) == 1.0
    # 2^24 + 1 rounds to even after each addition: 2^24 + 1 + 1 = 2^24
    assert dot(2.0**24, (1, 1), (1, 1)) == 2.0**24


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="vpfoo"):
        rewriter(lambda _: True)('declare <16 x i32> @"llvm.x86.avx512.vpfoo"(<16 x i32> %".1")')


def test_a_changed_signature_is_refused() -> None:
    name = "llvm.x86.avx512.pshuf.b.512"
    with pytest.raises(TypeError, match="pshuf"):
        rewriter(lambda _: True)(f'declare <64 x i8> @"{name}"(<64 x i8> %".1", <32 x i8> %".2")')


@pytest.mark.parametrize("name", TIERS)
def test_emulation_needs_no_features(name: str) -> None:
    tier = emulated(TIERS[name], features=frozenset())
    assert tier.all_features == frozenset()
    assert tier.target == PORTABLE.target
    assert tier.registers == TIERS[name].registers
    for op in ("byte_dot", "pair_dot", "lookup16"):
        assert tier.lowering(op) == TIERS[name].lowering(op)
