"""A server that meets hundreds of prompt lengths: graph jobs stay few, and no call costs more."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.graph_job import GraphJob
from hybrid_moe.streams.staging import MOST_JOBS
from tests.streams.model import E, H, Inputs, K, Model, layers, make_layers

SIZES = 2 * MOST_JOBS


def calls_of(function: Callable[[], object]) -> int:
    """How many functions, Python's and C's, `function` calls."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def of_size(tokens: int) -> Inputs:
    """Tokens of which all but the first are nobody's, so that runs are cheap."""
    ids = torch.full((tokens, K), -1)
    ids[0] = torch.tensor([0, 1])
    hidden = torch.ones(tokens, H, dtype=torch.bfloat16)
    return Inputs(hidden, ids, torch.ones(tokens, K))


def living_jobs() -> int:
    gc.collect()
    return sum(type(thing) is GraphJob for thing in gc.get_objects())


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
def test_jobs_stay_few_and_calls_cost_the_same(
    flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(flags=flags, count=1, own=make_layers())
    runner: Any = model.runners[0]
    assert runner.take_error() is None
    before, runner._faults.ignored_ids = living_jobs(), 0

    def call(tokens: int) -> None:
        given = of_size(tokens)
        runner.submit(*given.tensors, 1)
        runner.sync(given.hidden, 1)

    def cost() -> int:
        gc.collect()
        monkeypatch.setattr(keeping, "_busy", deque())  # without what other tests have left
        call(4000)
        model.gpu.run()
        return calls_of(lambda: call(4000))

    few = cost()
    model.gpu.run()
    results = []
    for tokens in range(2, SIZES):
        given = of_size(tokens)
        runner.submit(*given.tensors, 1)
        results.append(runner.sync(given.hidden, 1))
        if tokens % 20 == 0:  # the host runs ahead
            model.gpu.run()
    model.gpu.run()
    gc.collect()
    assert not [state for state, _ in keeping._busy if state._group is model.group]  # type: ignore[attr-defined]
    assert cost() == few
    model.gpu.run()
    assert living_jobs() - before <= MOST_JOBS
    assert all(torch.equal(result[0], results[0][0]) for result in results)
    assert not any(result[1:].any() for result in results)
    assert runner.take_error() is None  # and counts what the last calls have met
    assert runner.ignored_ids == sum(K * (tokens - 1) for tokens in range(2, SIZES)) + 4 * K * 3999


def test_a_report_costs_the_same_for_any_number_of_jobs() -> None:
    _, (layer, *_) = layers()
    pinned = {
        "x": np.zeros((SIZES, H), np.uint16),
        "ids": np.zeros((SIZES, K), np.int64),
        "weights": np.zeros((SIZES, K), np.float32),
        "out": np.zeros((SIZES, H), np.uint16),
        "skip": np.zeros(E, np.bool_),
    }
    addresses = {name: array.ctypes.data for name, array in pinned.items()}
    memory = JobMemory.new(layer.job_shape(SIZES, K))
    jobs = []

    def add(count: int) -> int:
        for tokens in range(1, count + 1):
            jobs.append(layer.graph_job(Batch(tokens, K, **addresses), memory, ignored_ids=0))
        return calls_of(layer.report)

    assert add(1) == add(SIZES)
