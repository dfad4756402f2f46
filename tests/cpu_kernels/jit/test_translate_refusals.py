"""What drivers may not do: translation errors say where and what, in a sentence."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.intrinsics import driver
from hybrid_moe.cpu_kernels.jit.translate import translate
from tests.cpu_kernels.toolbox import compiled

DRIVER_MODULE = """
from __future__ import annotations
from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, fence, fetch_add, load_acquire
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.jit.record import *

pair = 1, 2

class Layer(Record):
    experts = i64

class Job(Record):
    layer = pointer(Layer)
    tokens = i64
    ids = array(i64)
    counts = array(i32)
    tasks = i64[2, 3]
    first = inline(Layer)
    done = shared

@driver
def other(job: Job) -> int:
    return job.tokens

@driver
def some(job: Job, a: int) -> int:
    {body}
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("a.b = 1", "`a` is an integer, which has no field `b`"),
        ("a = b = 1", "drivers have no"),
        ("a, b = pair", "drivers have no"),
        ("a, job.tokens = 1, 2", "drivers have no"),
        ("a, b = 1, 2, 3", "drivers have no"),
        ("b: int = a", "drivers have no `b: int = a`"),
        ("for i in range(0, a, 2):\n        a = 1", "drivers have no `for i in range(0, a, 2)"),
        ("for i in [1, 2]:\n        a = 1", "drivers have no"),
        ("while a:\n        a = 0\n    else:\n        a = 1", "drivers have no"),
        ("try:\n        a = 1\n    except ValueError:\n        a = 2", "drivers have no `try:`"),
        ("raise ValueError", "drivers have no `raise ValueError`"),
        ("return", "drivers have no `return`"),
        ("a = 1 < a < 3", "drivers have no `1 < a < 3`"),
        ("a = [1]", "drivers have no `[1]`"),
        ("a = pair[0]", "`pair` is not an integer"),
        ("a = a / 2", "drivers have no Div"),
        ("a **= 2", "drivers have no Pow"),
        ("a = 1.5", "`1.5` is not an integer"),
        ("a = 1 << a if a else 0x8000000000000000", "takes more than 64 bits"),
        ("a = a or 3", "`a` is not a truth value"),
        ("a = a > 1 and (a < 9 or a)", "`a` is not a truth value"),
        ("a = records.RING\n    records = a", "`records` may be read before it is assigned"),
        ("a = nothing", "`nothing` is not known"),
        ("a = len(a)", "`len` is neither driver nor intrinsic"),
        ("a = max(a, key=a)", "by position"),
        ("a = max(*a)", "by position"),
        ("a = fence()", "`fence()` has no value"),
        ("fence(a)", "fence does not take 1 values"),
        ("a = some(job, a, a)", "some takes 2 values"),
        ("return 1\n    a = 2", "never reached"),
        ("while True:\n        a = 2\n    a = 3", "never reached"),
        ("if a:\n        return 1", "may end without a value"),
        # shifts, names
        ("a = a << 64", "`a << 64` shifts by 64: 0 to 63 can"),
        ("a >>= 64", "shifts by 64"),
        ("a = a >> -1", "shifts by -1"),
        ("a = b\n    b = 1", "`b` may be read before it is assigned"),
        ("if a:\n        b = 1\n    a = b", "`b` may be read before it is assigned"),
        ("for i in range(a):\n        b = i\n    a = b", "`b` may be read before"),
        ("for i in range(a):\n        a = i\n    a = i", "`i` may be read before"),
        ("while a:\n        b = a\n    a = b", "`b` may be read before"),
        (
            "while True:\n        if a:\n            break\n        b = 1\n    a = b",
            "`b` may be read before",
        ),
        ("b += 1", "`b` may be read before"),
        ("range = a\n    for i in range(a):\n        a = i", "`range` is not Python's here"),
        ("return some(job, a)", "some ends up calling itself"),
        # records
        ("a = job.token", "`job` is a Job, which has no field `token`"),
        ("job.token = a", "`job` is a Job, which has no field `token`"),
        ("a = job.layer.tokens", "`job.layer` is a Layer, which has no field `tokens`"),
        ("a = job + 1", "`job` is a Job, not an integer"),
        ("if job:\n        a = 1", "`job` is a Job, not an integer"),
        ("a = other(job.layer)", "`job` of other must be a Job, and `job.layer` is a Layer"),
        ("a = other(a)", "`job` of other must be a Job, and `a` is an integer"),
        ("b = job\n    b = job.layer", "`b` is a Job, and becomes a Layer"),
        ("a = job", "`a` is an integer, and becomes a Job"),
        ("job.layer = job", "`job.layer` must be a Layer, and `job` is a Job"),
        ("job.layer = a", "`job.layer` must be a Layer, and `a` is an integer"),
        ("job.ids = job.counts", "`job.ids` must be an array of i64, and `job.counts` is an array"),
        ("job.tokens = job", "`job` is a Job, not an integer"),
        ("a = job.ids[0, 1]", "`job.ids[0, 1]` takes 1 indices"),
        ("a = job.tasks[1]", "`job.tasks[1]` takes 2 indices"),
        ("a = job.tokens[1]", "`job.tokens` is an integer, not an array"),
        ("a = job.tasks + 1", "array of i64, not an integer"),
        (
            "job.tasks = job.ids",
            "`job.tasks` is i64[2, 3] within the record, and is not assigned to",
        ),
        ("job.first = job.layer", "is a Layer within the record, and is not assigned to"),
        ("a = a.address", "`a` is an integer and has no address"),
        (
            "a = job.done + 1",
            "`job.done` is a Word, which threads share: use the atomics, not an integer",
        ),
        ("job.done = a", "`job.done` is a word that threads share, and is not assigned to"),
        ("job.done += 1", "`job.done` is a word that threads share, not an integer"),
        (
            "a = load_acquire(job.tokens)",
            "the first value of load_acquire must be a Word, and `job.tokens` is an integer",
        ),
        ("a = job.done.value", "`job.done` is a Word, which has no field `value`"),
        ("a = load_acquire(a)", "must be a Word, and `a` is an integer"),
        ("a = fetch_add(job.done, job)", "`job` is a Job, not an integer"),
    ],
)
def test_what_is_not_a_driver(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file and the line."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"bad_{abs(hash(body))}"
    path = tmp_path / f"{name}.py"
    path.write_text(DRIVER_MODULE.format(body=body))
    module = importlib.import_module(name)
    with pytest.raises(SyntaxError, match=rf"{name}\.py:\d+: .*{re.escape(words)}.*in driver some"):
        translate({"some": module.some})


def test_what_a_driver_takes_and_returns() -> None:
    with pytest.raises(TypeError, match=r"f must return int, bool, None or a record, not float"):

        @driver
        def f(a: int) -> float:
            return a

    with pytest.raises(TypeError, match=r"g: a must be an int, a record, .* not float"):

        @driver
        def g(a: float) -> int:
            return 1

    with pytest.raises(TypeError, match=r"h must return .* not without an annotation"):

        @driver
        def h(a: int):
            return 1


def test_annotations_may_be_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a module that does not import annotations from the future."""
    monkeypatch.syspath_prepend(tmp_path)
    text = DRIVER_MODULE.format(body="return a + job.tokens")
    (tmp_path / "with_objects.py").write_text(text.replace("from __future__", "# "))
    module = importlib.import_module("with_objects")
    (code,) = compiled(module.some)
    job = module.Job.new()
    job.tokens = 5
    assert code(job.address, 2) == module.some(job, 2) == 7


def test_variables_of_an_enclosing_function() -> None:
    """Python reads them, and a driver cannot: also not where a global has the same name."""
    SEVEN = 6

    @driver
    def f(a: int) -> int:
        return a + SEVEN

    with pytest.raises(SyntaxError, match=r"`SEVEN` is a variable of the enclosing function"):
        translate({"f": f})


def test_no_driver_needs_an_interpreter() -> None:
    """The compiled program calls libc and LLVM only."""
    declared = set(re.findall(r'^declare .*?@"([^"]+)"', drivers.drivers_ir(), re.M))
    outside = {name for name in declared if not name.startswith("llvm.")}
    assert outside == {"syscall", "clock_gettime"}
