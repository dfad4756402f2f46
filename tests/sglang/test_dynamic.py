"""`HYBRID_MOE_DYNAMIC` without a server: its values, and what happens before a scheduler's step."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.sglang import contract, dynamic, step_faults
from hybrid_moe.integrations.sglang.expert_layer import UnsupportedLayerError
from hybrid_moe.placement import online
from hybrid_moe.placement.online import OnlineOptions
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import E, wrapper
from tests.hybrid_moe.signatures import signature_batch, signature_weights, signatures

WEIGHTS = signature_weights()
SCHEDULER = SimpleNamespace(enable_overlap=False, forward_stream=None)


def test_values() -> None:
    for environ in ({}, {dynamic.VARIABLE: ""}, {dynamic.VARIABLE: "0"}):
        assert dynamic.chosen("torch", environ) is None
        assert dynamic.chosen(None, environ) is None
    options = dynamic.chosen("cute", {dynamic.VARIABLE: "2GB,keep"})
    assert options == OnlineOptions(bytes_per_second=2 << 30, keep_panels=True)
    with pytest.raises(ValueError, match="HYBRID_MOE_DYNAMIC: dynamic is 'yes', must be True"):
        dynamic.chosen("cute", {dynamic.VARIABLE: "yes"})
    with pytest.raises(UnsupportedLayerError, match="set HYBRID_MOE_GPU to one of cute, torch"):
        dynamic.chosen(None, {dynamic.VARIABLE: "1"})


def layer(index: int) -> KTMoEWrapper:
    mask = torch.arange(E) < 3
    made = wrapper(layer_idx=index, gpu_experts_mask=mask, gpu_backend="torch", gpu_device="cpu")
    return WEIGHTS.load(made)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> dynamic.MovingExperts:
    """Of a process whose scheduler is the test."""
    made = dynamic.MovingExperts()
    checked: list[Any] = []
    monkeypatch.setattr(contract, "check", checked.append)
    monkeypatch.setattr(dynamic, "_install", lambda: checked.append("installed"))
    monkeypatch.setattr(online, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(dynamic, "REPORT_SECONDS", 0.0)
    made.checked = checked  # type: ignore[attr-defined]
    return made


def test_experts_move_before_steps(
    moving: dynamic.MovingExperts, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [layer(1), layer(0)]
    for each in layers:
        moving.join(each, OnlineOptions(half_life_pairs=2, payback_pairs=0))
    assert moving.checked == [dynamic.REQUIREMENTS, "installed"]  # type: ignore[attr-defined]
    assert moving.report() is None
    with caplog.at_level(logging.INFO):
        for step in range(30):
            moving.before_step(SCHEDULER, batch=None)
            for each in layers:
                given = signature_batch(4, step)
                given.ids[1:] = torch.tensor([5, 6, 7])
                assert torch.equal(each.forward(*given.args), signatures(given))
    report = moving.report()
    assert report is not None and report.swaps == 6
    for each in layers:
        assert each.gpu_experts_mask.nonzero().flatten().tolist() == [5, 6, 7]
    assert "HYBRID_MOE_DYNAMIC: hot experts took" in caplog.text


def test_layers_that_are_gone_are_not_moved(moving: dynamic.MovingExperts) -> None:
    kept, closed = layer(0), layer(1)
    for each in (kept, closed):
        moving.join(each, OnlineOptions())
    closed.close()
    dropped = layer(2)
    moving.join(dropped, OnlineOptions())
    del dropped
    moving.before_step(SCHEDULER)
    assert moving._online is not None and moving._online._layers == [kept]
    moving.join(layer(3), OnlineOptions())
    assert moving._online is None, "the next step begins with all of them"


def test_a_method_calls_each_of_its_hooks_once() -> None:
    told: list[str] = []

    class Scheduler:
        def run_batch(self, batch: int) -> int:
            told.append(f"run {batch}")
            return batch

    def one(scheduler: Any, batch: int) -> None:
        told.append("one")

    def two(scheduler: Any, batch: int) -> None:
        told.append("two")

    for hook in (one, two, one, two):
        step_faults.before(Scheduler, "run_batch", hook)
    assert Scheduler().run_batch(3) == 3
    assert told == ["two", "one", "run 3"]
