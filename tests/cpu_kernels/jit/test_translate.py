"""Compiled drivers against the same functions run as Python."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.drivers.intrinsics import compare_swap, driver, load_acquire
from hybrid_moe.cpu_kernels.drivers.records import Entry
from hybrid_moe.cpu_kernels.drivers.route import append_phases, route
from hybrid_moe.cpu_kernels.drivers.worker import copy_job
from hybrid_moe.cpu_kernels.jit.driver import Driver, Intrinsic
from hybrid_moe.cpu_kernels.jit.record import (
    Array,
    Record,
    Word,
    array,
    i8,
    i32,
    i64,
    inline,
    pointer,
    shared,
    shared_line,
    u8,
)
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.tuning import INLINE_ENCODE_TOKENS
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch
from tests.cpu_kernels.toolbox import compiled

INT64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)
SMALL = st.integers(-20, 40)
SEVEN = 7


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
    return (a << (b & 127)) - (a >> (b & 127)) + (a << 63) - (a >> 62)


@driver
def by_constants(a: int, b: int) -> int:
    return a // 3 + a % SEVEN - a // -5 + b % -16 + a // records.MAX_POOLS


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


@driver
def shift_up(a: int, b: int) -> int:
    return a << b


@driver
def shift_down(a: int, b: int) -> int:
    return a >> b


@pytest.fixture(scope="module")
def shifts() -> list[Callable[..., int]]:
    return compiled(shift_up, shift_down)


@given(a=INT64, b=st.integers(-200, 200) | INT64)
def test_shifts_by_any_number(shifts: list[Callable[..., int]], a: int, b: int) -> None:
    """By 64 or more, as Python's of a number with endless sign bits; so by less than 0."""
    by = b if 0 <= b < 64 else 64
    assert [code(a, b) for code in shifts] == [wrapped(a << by), a >> by]


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
    while n > 1:
        n -= 2
    return n == 0


@driver
def is_odd(n: int) -> bool:
    return not is_even(n)


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


def _compare_swap(word: Word, expected: int, desired: int) -> bool:
    if word.value != expected:
        return False
    word.value = desired
    return True


def _fetch_add(word: Word, value: int) -> int:
    before: int = word.value
    word.value = before + value
    return before


def _store(word: Word, value: int) -> None:
    word.value = value


def _call(kernel: int, *arguments: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(kernel)(*arguments)


MEANINGS: dict[str, Callable[..., Any]] = {
    "load_acquire": lambda word: word.value,
    "store_release": _store,
    "compare_swap": _compare_swap,
    "fetch_add": _fetch_add,
    "call": _call,
    "set_float_environment": lambda: 0,
    "restore_float_environment": lambda _: None,
}
"""What intrinsics do, in Python; fields and arrays are read and written there as they are."""


@pytest.fixture
def _python_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets drivers that run as Python read and write memory."""
    monkeypatch.setattr(
        Intrinsic, "__call__", lambda self, *arguments: MEANINGS[self.__name__](*arguments)
    )
    yield


@driver
def bump(at: int, by: int) -> bool:
    word = i64.at(at)
    word[0] += by
    return word[0] > 0


@driver
def evaluates_conditionally(at: int, a: int) -> None:
    if (bump(at, 1) and bump(at + 8, a)) or bump(at + 16, 1):
        bump(at + 24, 1 if compare_swap(shared.at(at)[4], a, 5) else i64.at(at)[1])
    ignored = bump(at + 40, a) if a > 3 else bump(at + 48, a)
    i64.at(at)[0] += ignored


def test_an_intrinsic_has_no_meaning_in_python() -> None:
    with pytest.raises(RuntimeError, match="load_acquire exists in compiled drivers only"):
        load_acquire(Word(0))


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


# records


class Leaf(Record):
    small = u8
    large = i64


class Tree(Record):
    leaf = pointer(Leaf)
    own = inline(Leaf)
    leaves = inline(Leaf)[3]
    tiny = array(i8)
    table = i32[2, 3]
    lines = shared_line[2]
    lone = shared


@driver
def largest(leaves: Array[Leaf], count: int) -> int:
    found = leaves[0].large
    for i in range(1, count):
        found = max(found, leaves[i].large)
    return found


@driver
def take(word: Word, value: int) -> bool:
    return compare_swap(word, value, value + 1)


@driver
def leaf_of(tree: Tree, other: int) -> Leaf:
    if other != 0:
        return tree.own
    return tree.leaf


@driver
def walk(tree: Tree, a: int) -> int:
    tree.leaf.large += a
    tree.leaves[a % 3].large = a
    tree.leaves[1].small -= 300 + a
    tree.own.large = largest(tree.leaves, 3)
    tiny = tree.tiny
    tiny[2] ^= a
    i8.at(tree.tiny.address)[0] = tree.leaf.small
    tree.table[a % 2, 2] = tree.table[1, a % 3] - a
    leaf_of(tree, a % 2).small += 1
    if a > 0:
        tree.leaf = tree.own
    return take(tree.lines[a % 2], a) + 2 * take(tree.lone, 3) + tree.leaf.large


@pytest.mark.usefixtures("_python_memory")
@given(a=SMALL, seed=st.integers(0, 99))
def test_records(walks: Callable[..., int], a: int, seed: int) -> None:
    """Whatever a driver does to them is the same in Python."""
    rng = np.random.default_rng(seed)
    results = []
    tree, leaf, tiny = Tree.new(), Leaf.new(), rng.integers(-128, 127, 4, np.int8)
    for word in range(len(tree.words)):
        tree.words[word] = int(rng.integers(-(2**40), 2**40))
    tree.lines[a % 2].value, tree.lone.value = a + seed % 2, 3
    for run in (walks, walk):
        mine, own_leaf, own_tiny = tree.copy(), leaf.copy(), tiny.copy()
        mine.leaf, mine.tiny = own_leaf, i8.at(own_tiny.ctypes.data)
        value = walks(mine.address, a) if run is walks else walk(mine, a)
        points_inside = mine.leaf.address == mine.own.address
        mine.leaf, mine.tiny = Leaf.at(0), i8.at(0)
        results.append(
            (int(value), points_inside, mine.words.tolist(), own_leaf.words.tolist(),
             own_tiny.tolist())
        )  # fmt: skip
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def walks() -> Callable[..., int]:
    (code,) = compiled(walk)
    return code


# the drivers themselves


@pytest.mark.usefixtures("_python_memory")
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_routing(tokens: int) -> None:
    """The same job, as Python and as machine code: its pairs, its encoded or copied rows, and the
    phases of its entry."""
    code_route, code_phases = compiled(route, append_phases)
    case = Case.random(MXFP4, 64, 96)
    layer = case.layer()
    batch = random_batch(tokens, case.H, case.E, 3)
    x, ids, weights = map(np.ascontiguousarray, batch)
    ids[0, 0], ids[-1, -1] = -1, case.E + 5
    layer.forward(x, ids, weights)
    memory = JobMemory.new(layer.job_shape(tokens, 3))
    at = [array.ctypes.data for array in (x, ids, weights)]
    results = []
    for find, cut in (
        (lambda job: code_route(job.address), lambda entry: code_phases(entry.address)),
        (route, append_phases),
    ):
        memory.fill(layer._ready().descriptor.address, Batch(tokens, 3, *at, skip=0, out=0))
        job, entry = memory.descriptor, Entry.new()
        missing = find(job)
        copy_job(entry.job, job)
        cut(entry)
        pairs = 3 * tokens - 2
        placed = [
            np.array([array[i] for i in range(count)])
            for array, count in (
                (job.active_expert, job.active),
                (job.active_start, job.active + 1),
                (job.pair_token, pairs),
                (job.pair_weight, pairs),
                (job.pair_x, pairs),
            )
        ]
        copied = tokens > INLINE_ENCODE_TOKENS
        assert job.x == (job.x_copy if copied else x.ctypes.data)
        taken_in, nbytes = job.x_rows, tokens * job.layer.gate_up.row_bytes
        if copied:
            taken_in, nbytes = job.x, x.nbytes
        placed.append(np.frombuffer(ctypes.string_at(taken_in, nbytes), np.uint8))
        results.append((missing, job.ignored, entry.words.tolist(), placed))
    (*numbers, words, placed), (*other_numbers, other_words, other_placed) = results
    assert numbers == other_numbers == [0, 2]
    assert words == other_words
    for one, other in zip(placed, other_placed, strict=True):
        assert np.array_equal(one, other)


def test_every_driver_is_reached() -> None:
    """What a driver module defines is part of the compiled program, under its own name."""
    text = drivers.drivers_ir()
    for module in ("worker", "route", "phases", "publish", "host", "mailbox", "patience"):
        found = vars(importlib.import_module(f"{drivers.__name__}.{module}"))
        mine = [value for value in found.values() if isinstance(value, Driver)]
        assert mine
        for function in mine:
            assert f'define internal {function.kind.return_type} @"{function.symbol}"(' in text
