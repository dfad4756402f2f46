"""Compiled drivers against the same functions run as Python."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import compare_swap, driver, load64, store64
from hybrid_moe.cpu_kernels.drivers.pack_strips import pack_strips
from hybrid_moe.cpu_kernels.drivers.route import prepare
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.jit.driver import Driver, Intrinsic
from hybrid_moe.cpu_kernels.jit.translate import translate
from hybrid_moe.cpu_kernels.job import StagedJob
from hybrid_moe.formats.table import MXFP4
from tests.cpu_kernels.cases import Case, random_batch

INT64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)
SMALL = st.integers(-20, 40)
SEVEN = 7


def compiled(*functions: Driver) -> list[Callable[..., int]]:
    """The drivers as machine code."""
    names = [function.__name__ for function in functions]
    text = translate(dict(zip(names, functions, strict=True)))
    at = compile_functions(text, PORTABLE.target, names, "test", program=True)
    kinds = [ctypes.CFUNCTYPE(*[ctypes.c_int64] * (1 + len(d.parameters))) for d in functions]
    return [kind(at[name]) for kind, name in zip(kinds, names, strict=True)]


def wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


# operators


@driver
def add(a: int, b: int) -> int:
    return a + b


@driver
def subtract(a: int, b: int) -> int:
    return a - b


@driver
def multiply(a: int, b: int) -> int:
    return a * b


@driver
def floor_divide(a: int, b: int) -> int:
    return a // b


@driver
def remainder(a: int, b: int) -> int:
    return a % b


@driver
def bits(a: int, b: int) -> int:
    return ((a & b) ^ ~b) | -a


@driver
def shift(a: int, b: int) -> int:
    return (a << (b & 63)) - (a >> (b & 63))


@driver
def by_constants(a: int, b: int) -> int:
    return a // 3 + a % SEVEN - a // -5 + b % -16 + a // f.LINE_SLOTS


@driver
def extremes(a: int, b: int) -> int:
    return max(1, a, b, -7) ^ min(a, 5)


@driver
def compare(a: int, b: int) -> int:
    bitmap = (a < b) + 2 * (a <= b) + 4 * (a > b) + 8 * (a >= b)
    return bitmap + 16 * (a == b) + 32 * (a != b) + 64 * (not a) + 128 * True


@driver
def logic(a: int, b: int) -> int:
    if (a > 0 and b > 0) or a == b:
        return 1
    either = a < 0 or b < 0
    return either + 2 if (a and not b) else either


OPERATORS = [
    add,
    subtract,
    multiply,
    floor_divide,
    remainder,
    bits,
    shift,
    by_constants,
    extremes,
    compare,
    logic,
]


@pytest.fixture(scope="module")
def operators() -> list[Callable[..., int]]:
    return compiled(*OPERATORS)


@given(a=INT64, b=INT64)
def test_operators(operators: list[Callable[..., int]], a: int, b: int) -> None:
    """Python's results modulo 2^64; dividing by zero gives 0."""
    for function, code in zip(OPERATORS, operators, strict=True):
        if function in (floor_divide, remainder) and b == 0:
            assert code(a, b) == 0
        else:
            assert code(a, b) == wrapped(int(function(a, b))), function.__name__


# control flow


@driver
def greatest_divisor(a: int, b: int) -> int:
    while b != 0:
        a, b = b, a % b
    return a


@driver
def sum_of_primes(stop: int, most: int) -> int:
    total = 0
    found = 0
    for n in range(2, stop):
        prime = True
        for divisor in range(2, n):
            if n % divisor == 0:
                prime = False
                break
        if not prime:
            continue
        if found == most:
            break
        found += 1
        total += n
    return total * 100 + found


@driver
def collatz(a: int, b: int) -> int:
    steps = 0
    n = max(1, a)
    while True:
        if n == 1:
            return steps
        if steps > b:
            break
        if n % 2 == 0:
            n //= 2
        else:
            n = 3 * n + 1
        steps += 1
    return -n


@driver
def index_after_the_loop(a: int, b: int) -> int:
    i = -1
    for i in range(a, b):
        i *= 2
    return i


@driver
def bounds_are_evaluated_once(a: int, b: int) -> int:
    turns = 0
    for i in range(a):
        a -= 3
        b += i
        turns += 1
    return turns * 1000 + b


@driver
def is_even(n: int) -> bool:
    if n == 0:
        return True
    return is_odd(n - 1)


@driver
def is_odd(n: int) -> bool:
    return n != 0 and is_even(n - 1)


@driver
def parity(a: int, b: int) -> int:
    return 10 if is_even(abs_of(a)) else is_odd(abs_of(b))


@driver
def abs_of(a: int) -> int:
    if a < 0:
        return -a
    if a > 30:
        a = 30
    elif a > 20:
        a -= 1
    else:
        pass
    return a


CONTROL = [
    greatest_divisor,
    sum_of_primes,
    collatz,
    index_after_the_loop,
    bounds_are_evaluated_once,
    parity,
]


@pytest.fixture(scope="module")
def control() -> list[Callable[..., int]]:
    return compiled(*CONTROL)


@given(a=SMALL, b=SMALL)
def test_control_flow(control: list[Callable[..., int]], a: int, b: int) -> None:
    for function, code in zip(CONTROL, control, strict=True):
        assert code(a, b) == function(a, b), function.__name__


# memory


def _at(kind: Any, address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(kind))


def _compare_swap(address: int, expected: int, desired: int) -> bool:
    word = _at(ctypes.c_int64, address)
    if word[0] != expected:
        return False
    word[0] = desired
    return True


def _call6(kernel: int, *arguments: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(kernel)(*arguments)


MEANINGS: dict[str, Callable[..., Any]] = {
    "load64": lambda a: _at(ctypes.c_int64, a)[0],
    "load32": lambda a: _at(ctypes.c_int32, a)[0],
    "load8": lambda a: _at(ctypes.c_uint8, a)[0],
    "load_acquire": lambda a: _at(ctypes.c_int64, a)[0],
    "store64": lambda a, v: _at(ctypes.c_int64, a).__setitem__(0, v),
    "store32": lambda a, v: _at(ctypes.c_int32, a).__setitem__(0, v),
    "store8": lambda a, v: _at(ctypes.c_uint8, a).__setitem__(0, v),
    "compare_swap": _compare_swap,
    "call6": _call6,
    "set_float_environment": lambda: 0,
    "restore_float_environment": lambda _: None,
}
"""What intrinsics do, in Python."""


@pytest.fixture
def _python_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets drivers that run as Python read and write memory."""
    monkeypatch.setattr(
        Intrinsic, "__call__", lambda self, *arguments: MEANINGS[self.__name__](*arguments)
    )
    yield


@driver
def bump(at: int, by: int) -> bool:
    store64(at, load64(at) + by)
    return load64(at) > 0


@driver
def evaluates_conditionally(at: int, a: int) -> None:
    if (bump(at, 1) and bump(at + 8, a)) or bump(at + 16, 1):
        bump(at + 24, 1 if compare_swap(at + 32, a, 5) else load64(at + 8))
    ignored = bump(at + 40, a) if a > 3 else bump(at + 48, a)
    store64(at, load64(at) + ignored)


def test_an_intrinsic_has_no_meaning_in_python() -> None:
    with pytest.raises(RuntimeError, match="load64 exists in compiled drivers only"):
        load64(0)


@pytest.mark.usefixtures("_python_memory")
@pytest.mark.parametrize("a", range(-3, 7))
def test_what_is_evaluated(a: int) -> None:
    """Operands and branches that do not matter leave no trace in memory."""
    (code,) = compiled(evaluates_conditionally)
    memory = np.array([[-1, 2, 3, 4, 5, 6, 7], [0, -2, -1, 4, a, 6, 7]], np.int64)
    expected = memory.copy()
    for row, other in zip(memory, expected, strict=True):
        assert code(row.ctypes.data, a) == 0
        evaluates_conditionally(other.ctypes.data, a)
    assert np.array_equal(memory, expected)


# the drivers themselves


@pytest.mark.usefixtures("_python_memory")
@pytest.mark.parametrize("panel_rows", [16, 32])
@pytest.mark.parametrize("rows", [32, 50])
def test_packing(rows: int, panel_rows: int) -> None:
    (code,) = compiled(pack_strips)
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 256, (2, 64, 48), np.uint8)
    scales = rng.integers(0, 256, (2, 64, 3), np.uint8)
    results = []
    for run in (code, pack_strips):
        out = np.full((3, 2048), 0xEE, np.uint8)
        at = [out.ctypes.data, 0, 3, 2048, 1536, 12, 3]
        at += [codes[0].ctypes.data, codes[1].ctypes.data, 48]
        at += [scales[0].ctypes.data, scales[1].ctypes.data, 3, panel_rows, min(rows, 3 * 16)]
        run(*at)
        results.append(out)
    assert np.array_equal(*results)


@pytest.mark.usefixtures("_python_memory")
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_routing(tokens: int) -> None:
    """`prepare` on the same memory, as Python and as machine code."""
    (code,) = compiled(prepare)
    case = Case.random(MXFP4, 64, 96)
    layer = case.layer()
    x, ids, weights = random_batch(tokens, case.H, case.E, 3)
    ids[0, 0], ids[-1, -1] = -1, case.E + 5
    layer.forward(x, ids, weights)
    job = StagedJob(layer.slot_shape(tokens, 3))
    results = []
    for run in (code, prepare):
        job.stage(x, ids, weights, None)
        address = job.address(layer._ready().address, 0)
        before = job.template.copy()
        missing = run(address)
        pairs = int(job.template[f.J_ACTIVE]), int(job.template[f.J_MOST])
        placed = [
            np.ctypeslib.as_array(_at(ctypes.c_int32, int(job.template[slot])), (count,)).copy()
            for slot, count in (
                (f.J_ACTIVE_EXPERT, pairs[0]),
                (f.J_ACTIVE_START, pairs[0] + 1),
                (f.J_PAIR_TOKEN, 3 * tokens - 2),
                (f.J_PAIR_WEIGHT, 3 * tokens - 2),
                (f.J_PAIR_X, 2 * (3 * tokens - 2)),
                (f.J_PAIR_H, 2 * (3 * tokens - 2)),
            )
        ]
        results.append((missing, job.template.copy(), placed))
        job.template[:] = before
    (missing, template, placed), (other_missing, other_template, other_placed) = results
    assert missing == other_missing == 0
    assert np.array_equal(template, other_template)
    assert template[f.J_IGNORED] == 2
    for one, other in zip(placed, other_placed, strict=True):
        assert np.array_equal(one, other)


def test_every_driver_is_reached() -> None:
    """What a driver module defines is part of the compiled program, under its own name."""
    text = drivers.drivers_ir()
    for module in ("worker", "route", "phases", "pack_strips", "host"):
        found = vars(importlib.import_module(f"{drivers.__name__}.{module}"))
        mine = [value for value in found.values() if isinstance(value, Driver)]
        assert mine
        for function in mine:
            assert f'define internal {function.kind.return_type} @"{function.symbol}"(' in text


# what drivers may not do


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("a.b = 1", "drivers have no `a.b = 1`"),
        ("a = b = 1", "drivers have no"),
        ("a, b = pair", "drivers have no"),
        ("a, pair[0] = 1, 2", "drivers have no"),
        ("a, b = 1, 2, 3", "drivers have no"),
        ("for i in range(0, a, 2):\n        a = 1", "drivers have no `for i in range(0, a, 2)"),
        ("for i in [1, 2]:\n        a = 1", "drivers have no"),
        ("while a:\n        a = 0\n    else:\n        a = 1", "drivers have no"),
        ("try:\n        a = 1\n    except ValueError:\n        a = 2", "drivers have no `try:`"),
        ("raise ValueError", "drivers have no `raise ValueError`"),
        ("return", "drivers have no `return`"),
        ("a = 1 < a < 3", "drivers have no `1 < a < 3`"),
        ("a = [1]", "drivers have no `[1]`"),
        ("a = a / 2", "drivers have no Div"),
        ("a **= 2", "drivers have no Pow"),
        ("a = 1.5", "`1.5` is not an integer"),
        ("a = 1 << a if a else 0x8000000000000000", "takes more than 64 bits"),
        ("a = a or 3", "`a` is not a truth value"),
        ("a = a > 1 and (a < 9 or a)", "`a` is not a truth value"),
        ("a = f.RING\n    f = a", "`f` is not known"),
        ("a = nothing", "`nothing` is not known"),
        ("a = len(a)", "`len` is neither driver nor intrinsic"),
        ("a = max(a, key=a)", "by position"),
        ("a = max(*a)", "by position"),
        ("a = store64(a, a)", "`store64(a, a)` has no value"),
        ("a = some(a, a)", "some takes 1 values"),
        ("return 1\n    a = 2", "never reached"),
        ("while True:\n        a = 2\n    a = 3", "never reached"),
        ("if a:\n        return 1", "may end without a value"),
    ],
)
def test_what_is_not_a_driver(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file and the line."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"bad_{abs(hash(body))}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, store64\n"
        "from hybrid_moe.cpu_kernels.drivers import fields as f\n"
        "pair = 1, 2\n\n\n"
        f"@driver\ndef some(a: int) -> int:\n    {body}\n"
    )
    module = importlib.import_module(name)
    with pytest.raises(SyntaxError, match=rf"{name}\.py:\d+: .*{re.escape(words)}.*in driver some"):
        translate({"some": module.some})


def test_a_driver_says_what_it_returns() -> None:
    with pytest.raises(TypeError, match=r"f must return one of int, bool, None, not float"):

        @driver
        def f(a: int) -> float:
            return a


def test_no_driver_needs_an_interpreter() -> None:
    """The compiled program calls libc and LLVM only."""
    declared = set(re.findall(r'^declare .*?@"([^"]+)"', drivers.drivers_ir(), re.M))
    outside = {name for name in declared if not name.startswith("llvm.")}
    assert outside == {"syscall", "clock_gettime"}
