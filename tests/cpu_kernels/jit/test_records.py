"""Records are the same memory for Python, for NumPy and for compiled drivers."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.drivers import records as declared
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.jit.driver import Driver
from hybrid_moe.cpu_kernels.jit.record import (
    LINE,
    Record,
    array,
    i32,
    i64,
    inline,
    pointer,
    shared,
    shared_line,
    u8,
)
from hybrid_moe.cpu_kernels.jit.translate import translate
from hybrid_moe.cpu_kernels.kernels.encode import Fixed15Group, SummedGroup

BITS = {"i64": 64, "i32": 32, "i8": 8, "u8": 8, "f32": 32}

DECLARED = [kind for kind in vars(declared).values() if isinstance(kind, type)]
DECLARED += [Fixed15Group, SummedGroup]


class Pair(Record):
    small = u8
    large = i64


class All(Record):
    one = i32
    pair = inline(Pair)
    pairs = inline(Pair)[2]
    byte = u8
    next = pointer(Pair)
    items = array(i32)
    line = shared_line
    table = i64[2, 3]
    lone = shared
    lines = shared_line[2]


def compiled(module: ModuleType) -> dict[str, Callable[..., int]]:
    """The drivers of a module as machine code."""
    drivers: dict[str, Driver[..., Any]] = {
        name: value for name, value in vars(module).items() if isinstance(value, Driver)
    }
    at = compile_functions(translate(drivers), PORTABLE.target, list(drivers), "t", program=True)
    return {
        name: ctypes.CFUNCTYPE(*[ctypes.c_int64] * (1 + len(driver.parameters)))(at[name])
        for name, driver in drivers.items()
    }


# the rule of the layout


def test_offsets() -> None:
    """In the order of declaration, each at the next multiple of its alignment."""
    offsets = {name: field.offset for name, field in All.fields.items()}
    assert offsets == {
        "one": 0, "pair": 8, "pairs": 24, "byte": 56, "next": 64, "items": 72, "line": 128,
        "table": 192, "lone": 240, "lines": 256,
    }  # fmt: skip
    assert (All.nbytes, All.alignment) == (384, LINE)
    assert (Pair.nbytes, Pair.alignment) == (16, 8)


@pytest.mark.parametrize("record", DECLARED, ids=lambda record: record.__name__)
def test_dtypes_have_the_same_offsets(record: type[Record]) -> None:
    fields = {name: (field.kind.dtype, field.offset) for name, field in record.fields.items()}
    assert record.dtype.fields is not None
    assert {name: place[:2] for name, place in record.dtype.fields.items()} == fields
    assert record.dtype.itemsize == record.nbytes
    ends = [(f.offset, f.offset + f.kind.nbytes) for f in record.fields.values()]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


@pytest.mark.parametrize("record", DECLARED, ids=lambda record: record.__name__)
def test_words_with_a_line_have_it_to_themselves(record: type[Record]) -> None:
    for field in record.fields.values():
        if field.kind is shared_line:
            assert field.offset % LINE == 0 and field.kind.nbytes == LINE
            assert record.alignment % LINE == 0
            assert record.new().address % LINE == 0


# Python, NumPy and compiled drivers


@dataclass(frozen=True)
class Layout:
    """Fields of a record: (kind, shape) each, () for one."""

    fields: tuple[tuple[str, tuple[int, ...]], ...]

    def source(self) -> str:
        lines = ["from hybrid_moe.cpu_kernels.drivers.intrinsics import driver"]
        lines += ["from hybrid_moe.cpu_kernels.jit.record import *", "class R(Record):"]
        for number, (kind, shape) in enumerate(self.fields):
            lines.append(f"    f{number} = {kind}" + (f"{list(shape)}" if shape else ""))
        for number, (_, shape) in enumerate(self.fields):
            names = [f"i{axis}" for axis in range(len(shape))]
            place = f"r.f{number}" + (f"[{', '.join(names)}]" if shape else "")
            takes = ", ".join(["r: R", *(f"{name}: int" for name in names)])
            lines += ["@driver", f"def get{number}({takes}) -> int:", f"    return {place}"]
            lines += ["@driver", f"def put{number}({takes}, v: int) -> None:", f"    {place} = v"]
        return "\n".join(lines) + "\n"


shapes = st.sampled_from([(), (), (3,), (1,), (2, 3), (2, 1, 2)])
layouts = st.lists(st.tuples(st.sampled_from(sorted(BITS)), shapes), min_size=1, max_size=6)


@settings(
    max_examples=settings.default.max_examples // 5 + 1,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields=layouts, seed=st.integers(0, 2**32 - 1))
def test_what_numpy_writes_drivers_read(
    fields: list[tuple[str, tuple[int, ...]]],
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the reverse, and so does Python on a record; values keep the low bits of their kind."""
    layout = Layout(tuple(fields))
    name = f"layout_{abs(hash(layout))}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text(layout.source())
    module = importlib.import_module(name)
    drivers, rng = compiled(module), np.random.default_rng(seed)
    view = np.zeros((), module.R.dtype)
    mine = module.R.at(view.ctypes.data)
    for number, (kind, shape) in enumerate(layout.fields):
        low = 1 << BITS[kind]
        for index in np.ndindex(shape):
            value = int(rng.integers(-(2**63), 2**63 - 1))
            drivers[f"put{number}"](mine.address, *index, value)
            stored = value % low
            stored -= low if kind != "u8" and stored >= low // 2 else 0
            at_numpy = view[f"f{number}"][index] if shape else view[f"f{number}"]
            if kind == "f32":
                at_numpy = np.float32(at_numpy).view(np.int32)
            if kind != "f32" or not np.isnan(np.int32(stored).view(np.float32)):
                assert int(at_numpy) == stored
            attribute = getattr(mine, f"f{number}")
            assert (attribute[index] if shape else attribute) == stored
            assert drivers[f"get{number}"](mine.address, *index) == stored
        if kind != "f32":
            values = rng.integers(0, min(low // 2, 2**62), shape)
            view[f"f{number}"] = values
            for index in np.ndindex(shape):
                assert drivers[f"get{number}"](mine.address, *index) == np.asarray(values)[index]


def test_references() -> None:
    """What fields lead to: records by address and by value, arrays, words."""
    record, pair, items = All.new(), Pair.new(), np.zeros(3, np.int32)
    record.next, record.items = pair, i32.at(items.ctypes.data)
    record.next.large = 7
    record.pairs[1].small = 300
    record.items[2] = -5
    record.table[1, 2] += 4
    record.lone.value = 9
    record.lines[1].value = 10
    dtype = np.frombuffer(record.words, All.dtype)[0]
    assert pair.large == 7 and items[2] == -5
    assert dtype["pairs"][1]["small"] == 300 % 256
    assert dtype["table"][1, 2] == 4
    assert dtype["lone"] == 9 and dtype["lines"]["word"].tolist() == [0, 10]
    assert dtype["next"] == pair.address and dtype["items"] == items.ctypes.data
    other = record.copy()
    other.table[1, 2] = 5
    assert (record.table[1, 2], other.table[1, 2], other.lone.value) == (4, 5, 9)


# filling in


def test_writers() -> None:
    write = All.writer("next", "items")
    record = All.new()
    write(record.words, 3, 4)
    assert (record.next.address, record.items.address) == (3, 4)
    assert record.words[All.word("next")] == 3
    assert record.words[All.word("table")] == record.table[0, 0]


def test_names_that_are_wrong() -> None:
    with pytest.raises(AttributeError, match="All has no field `nothing`"):
        All.word("nothing")
    with pytest.raises(TypeError, match=r"All\.one is no word but i32"):
        All.word("one")
    with pytest.raises(TypeError, match=r"All\.lone is not the word behind those before it"):
        All.writer("next", "lone")
    with pytest.raises(TypeError, match=r"All\.table is not the word behind"):
        All.writer("next", "items", "table")
    with pytest.raises(AttributeError):
        All.new().nothing  # noqa: B018
    with pytest.raises(AttributeError):
        All.new().nothing = 1  # type: ignore[attr-defined]


def test_what_is_not_assigned_to() -> None:
    record = All.new()
    with pytest.raises(TypeError, match="a word that threads share is not assigned to"):
        record.lone = record.line
    with pytest.raises(TypeError, match="a Pair within the record is not assigned to"):
        record.pair = Pair.new()
    with pytest.raises(IndexError, match="1 indices for 2 dimensions"):
        record.table[1]
    with pytest.raises(IndexError, match="index 3 is not one of 3"):
        record.table[1, 3]
    with pytest.raises(IndexError, match="has one index"):
        record.items[1, 3]
    with pytest.raises(ValueError, match="8 bytes do not hold an All: 384"):
        All.over(np.zeros(8, np.uint8))


def test_names_that_every_record_has() -> None:
    with pytest.raises(TypeError, match=r"Bad\.nbytes: every record has a `nbytes` already"):
        type("Bad", (Record,), {"nbytes": i64})
