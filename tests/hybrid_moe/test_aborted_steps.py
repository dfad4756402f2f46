"""A step that fails anywhere leaves nothing behind: at most one error, then right results.

The exception is raised in turn at every line that a step runs of the wrapper's own modules, by a
trace function; what a Ctrl-C or a lack of memory may do.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import Batch, Weights, wrapper
from tests.reference import assert_within

FOLDER = Path(hybrid_moe.__file__).parent
TRACED = {
    str(FOLDER / f"{name}.py")
    for name in (
        "wrapper",
        "runtime/runner",
        "runtime/host_mask",
        "runtime/deferral",
        "runtime/submission",
    )
}
LAYERS = (0, 1, 3)
WEIGHTS = [Weights.random(seed=index) for index in LAYERS]

SHORT, LONG = 2, 9
"""Tokens whose rows `submit` encodes, and those of which it leaves a copy to the workers."""


WATCHDOG_S = 120
"""Far above what the interrupted steps take: a failure instead of a test that never ends."""


class InjectedError(BaseException):
    """Like KeyboardInterrupt, and told apart from it."""


def model(deferred: int) -> list[KTMoEWrapper]:
    chain = DeferralChain() if deferred else None
    return [
        weights.load(
            wrapper(layer_idx=index, max_deferred_experts_per_token=deferred, deferral_chain=chain)
        )
        for index, weights in zip(LAYERS, WEIGHTS, strict=True)
    ]


def batches(tokens: int) -> list[Batch]:
    return [Batch.random(tokens, seed=tokens + at) for at in range(len(LAYERS))]


def step(layers: list[KTMoEWrapper], tokens: int, together: bool) -> list[torch.Tensor]:
    """One step of the model, each layer by one call or by two."""
    outputs = []
    for w, batch in zip(layers, batches(tokens), strict=True):
        if together:
            outputs.append(w.forward(*batch.args))
        else:
            w.submit_forward(*batch.args)
            outputs.append(w.sync_forward(batch.hidden))
    return outputs


def raising_at(count: int) -> tuple[Callable[..., Any], list[int]]:
    """A trace function that raises at the `count`th line of the traced modules, and how many it
    has seen."""
    seen = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == count:
                raise InjectedError
        return trace

    return trace, seen


@pytest.fixture
def traced() -> Iterator[Callable[[int, Callable[[], Any]], bool]]:
    """Runs a function with an exception at a line; whether the line was reached."""
    before = sys.gettrace()

    def run(count: int, function: Callable[[], Any]) -> bool:
        trace, seen = raising_at(count)
        sys.settrace(trace)
        try:
            function()
        except InjectedError:
            pass
        finally:
            sys.settrace(before)
        return seen[0] >= count

    yield run
    sys.settrace(before)


@pytest.mark.parametrize(
    ("together", "resetting"),
    [(False, False), (False, True), (True, False)],
    ids=["two_calls", "two_calls_reset", "one_call"],
)
@pytest.mark.parametrize(("tokens", "deferred"), [(SHORT, 0), (LONG, 0), (LONG, 2)])
def test_a_step_that_fails_at_any_line(
    traced: Any, tokens: int, deferred: int, together: bool, resetting: bool
) -> None:
    layers = model(deferred)
    expected = step(layers, tokens, together)
    if not deferred:
        for weights, batch, y in zip(WEIGHTS, batches(tokens), expected, strict=True):
            assert_within(y.double().numpy(), weights.expected(batch))
    line, errors = 1, 0
    while traced(line, lambda: step(layers, tokens, together)):
        if resetting:
            layers[0].reset() if deferred else [w.reset() for w in layers]
        try:
            outputs = step(layers, tokens, together)
        except RuntimeError as error:
            assert not resetting, f"line {line}: {error}"
            errors += 1
            outputs = step(layers, tokens, together)  # at most one error
        assert all(map(torch.equal, outputs, expected)), f"line {line}"
        line += 1
    assert line > 60
    # a call of `forward` leaves nothing; one of `submit_forward` is told apart from a mistake
    assert (errors > 0) == (not resetting and bool(deferred or not together))


@pytest.mark.parametrize("deferred", [0, 2])
@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_a_submission_without_a_sync(tokens: int, deferred: int) -> None:
    """At each layer in turn; the steps before and after may have other numbers of tokens."""
    layers = model(deferred)
    expected = step(layers, tokens, False)
    for at, abandoned in enumerate(layers):
        for other in (tokens, 3, 11):
            for w, batch in zip(layers[:at], batches(other), strict=False):
                w.forward(*batch.args)
            abandoned.submit_forward(*batches(other)[at].args)
            with pytest.raises(RuntimeError, match=r"reset\(\)"):
                step(layers, tokens, False)
            assert all(map(torch.equal, step(layers, tokens, False), expected))
            abandoned.submit_forward(*batches(other)[at].args)
            abandoned.reset()
            assert all(map(torch.equal, step(layers, tokens, False), expected))


def test_reset_of_one_layer_without_a_chain_leaves_the_others() -> None:
    layers = model(0)
    given = batches(SHORT)
    for w, batch in zip(layers, given, strict=True):
        w.submit_forward(*batch.args)
    layers[0].reset()
    with pytest.raises(RuntimeError, match="has no submission"):
        layers[0].sync_forward(given[0].hidden)
    for w, weights, batch in list(zip(layers, WEIGHTS, given, strict=True))[1:]:
        y = w.sync_forward(batch.hidden)
        assert_within(y.double().numpy(), weights.expected(batch))


def test_reset_where_nothing_is_under_way() -> None:
    empty, layers = wrapper(), model(2)
    empty.reset()
    expected = step(layers, LONG, True)
    for w in layers:
        w.reset()
    assert all(map(torch.equal, step(layers, LONG, True), expected))


@pytest.mark.parametrize("deferred", [0, 2])
def test_interrupts_of_a_thread(deferred: int) -> None:
    """An exception set from another thread arrives anywhere, compiled code's waits included."""
    layers = model(deferred)
    expected = {tokens: step(layers, tokens, True) for tokens in (SHORT, LONG)}
    wrong: list[str] = []
    steps, stop = [0], threading.Event()

    def use() -> None:
        while not stop.is_set():
            tokens = (SHORT, LONG)[steps[0] % 2]
            for attempt in range(4):
                try:
                    outputs = step(layers, tokens, steps[0] % 3 == 0)
                    if not all(map(torch.equal, outputs, expected[tokens])):
                        wrong.append("values")
                    break
                except InjectedError:
                    continue
                except RuntimeError as error:
                    if "reset()" not in str(error) or attempt == 3:
                        wrong.append(str(error))
                        return
            steps[0] += 1

    def guarded() -> None:
        while not stop.is_set():
            try:
                use()
                return
            except InjectedError:
                continue

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    seen, end = 0, time.monotonic() + WATCHDOG_S
    for _ in range(60):
        while steps[0] == seen and thread.is_alive():
            stop.wait(0.001)
            assert time.monotonic() < end, "the thread hangs"
        seen = steps[0]
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(InjectedError)
        )
    stop.set()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive(), "the thread hangs"
    assert not wrong
    for w in layers:
        w.reset()
    for tokens, outputs in expected.items():
        assert all(map(torch.equal, step(layers, tokens, False), outputs))
