"""Short batches for which experts are sent or put off: the torch back end, on CPU tensors."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_moe
from hybrid_moe.cpu_kernels.trace import tracing
from hybrid_moe.placement.online import OnlineOptions, OnlinePlacement
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.placement_moves import ExpertPlacement
from hybrid_moe.runtime.prefill_loads import PrefillLoad
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.runtime.step_choices import StepRouting
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.step_scheduler import LayerChoice
from tests.hybrid_moe.cases import E, K
from tests.hybrid_moe.runtime.test_prefill_stream import GivenPlanner, all_free, layers
from tests.hybrid_moe.signatures import signature_batch, signatures
from tests.hybrid_moe.steps import SLOW_CPU, AnySteps, move, sure

FAST_CPU = MachineRates(cpu_read=1e15, gpu_read=1e12, gpu_flops=1e15, link=1e6)


def stream_of(steps: Any, slots: int = 5) -> PrefillStream:
    return PrefillStream(GivenPlanner(), slots, steps=steps)


BATCHES = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 6), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 1), st.integers(0, E - 1)),
        st.tuples(st.just("skip"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("drop"), st.integers(1, 3), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("deferred", [0, K])
def test_every_pair_runs_once(deferred: int) -> None:
    """Whatever is sent and put off, with experts that move, a layer that is left out, and steps
    that are given up in between."""
    steps = AnySteps(random.Random(0))
    stream = stream_of(steps)
    chain = DeferralChain()
    model = layers(stream, deferral_chain=chain, max_deferred_experts_per_token=deferred)
    seeds = iter(range(1 << 30))
    before, pairs = [w.pairs for w in model], 0

    @settings(max_examples=12, deadline=None)
    @given(BATCHES)
    def run(actions: list[tuple[str, int, int]]) -> None:
        nonlocal pairs
        for what, number, expert in actions:
            if what == "move":
                move(model[number], expert)
                continue
            if what == "drop":
                batch = signature_batch(number, next(seeds))
                model[0].submit_forward(*batch.args)
                model[0].reset()
                pairs += int((batch.ids >= 0).sum())
                continue
            used = model[-1:] if what == "skip" else model
            batches = [signature_batch(number, next(seeds)) for _ in used]
            pairs += sum(int((b.ids >= 0).sum()) for b in batches)
            outputs = [w.forward(*b.args) for w, b in zip(used, batches, strict=True)]
            expected = [signatures(b) for b in batches]
            assert torch.equal(sum(outputs), sum(expected))  # type: ignore[arg-type]
            assert deferred or all(map(torch.equal, outputs, expected))

    run()
    assert all_free(stream)
    assert steps.sent > 0 and bool(steps.deferred) == bool(deferred)
    found = [(w.pairs[0] - b[0], w.pairs[1] - b[1]) for w, b in zip(model, before, strict=True)]
    assert sum(hot + cold for hot, cold in found) == pairs, "each pair is counted once"
    stream.learn()
    assert steps.noted > 0 and steps.carried == stream.sent_bytes > 0
    for w in model:
        w.close()


def test_a_slow_cpu_sends(tmp_path: Path) -> None:
    """Decode is what it is without, experts travel, and the trace says which and why."""
    plain, sending = layers(PrefillStream(GivenPlanner(), 5)), layers(stream_of(sure(SLOW_CPU)))
    before = hybrid_moe.metrics()
    with tracing(tmp_path / "trace.json"):
        for seed in range(4):
            for at, (w, other) in enumerate(zip(sending, plain, strict=True)):
                batch = signature_batch(1, 2 * seed + at)
                batch.ids[:] = torch.tensor([1, 3 + seed, 0 if at else 2])
                out = w.forward(*batch.args)
                assert torch.equal(out, signatures(batch))
                assert torch.equal(out, other.forward(*batch.args))
    found = hybrid_moe.metrics() - before
    stream = sending[0].prefill_stream
    assert stream is not None and found.sent_bytes == stream.sent_bytes
    assert found.sent_experts * sending[0]._layer.expert_nbytes(0) == stream.sent_bytes > 0
    assert found.deferred_pairs == found.stays == 0
    assert "hybrid_moe_sent_experts_total" in hybrid_moe.metrics().prometheus()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    decisions = [e for e in events if rows.get(e.get("tid")) == "decisions" and e["ph"] == "X"]
    assert len(decisions) == 8, "one for each layer and step"
    explained = [e["name"] for e in decisions]
    assert all("1 sent of" in name and "us by the layers after" in name for name in explained)
    assert sum(len(e["args"]["sent"]) for e in decisions) == found.sent_experts == 8
    assert {"experts layer 0", "experts layer 3"} <= {e.get("name") for e in events}


def test_decisions_put_pairs_off() -> None:
    """Where attention takes as long as an expert, the least weighted one runs under it: what a
    decision defers comes with the next layer, and the last layer defers nothing."""
    planner = sure(SLOW_CPU)
    planner.before = 5.0  # an expert takes 5 s by these rates
    model = layers(
        stream_of(planner),
        deferral_chain=DeferralChain(),
        max_deferred_experts_per_token=2,
    )
    before, late = hybrid_moe.metrics(), 0
    for seed in range(6):
        batches = [signature_batch(1, 2 * seed + at) for at in range(2)]
        outputs = [w.forward(*b.args) for w, b in zip(model, batches, strict=True)]
        expected = [signatures(b) for b in batches]
        assert torch.equal(outputs[0] + outputs[1], expected[0] + expected[1])
        late += not torch.equal(outputs[0], expected[0])
    assert (hybrid_moe.metrics() - before).deferred_pairs >= late > 0


def test_a_fast_cpu_sends_none() -> None:
    """And is asked more and more rarely."""
    planner = sure(FAST_CPU)
    stream = stream_of(planner)
    model = layers(stream)
    asked: list[int] = []
    choose = planner.choose

    def counted(load: PrefillLoad, routing: StepRouting) -> LayerChoice:
        asked.append(load.layer)
        return choose(load, routing)

    planner.choose = counted  # type: ignore[method-assign]
    for seed in range(40):
        for at, w in enumerate(model):
            batch = signature_batch(1, 2 * seed + at)
            assert torch.equal(w.forward(*batch.args), signatures(batch))
    assert stream.sent_bytes == 0
    # steps 0, 2, 6, 14 and 30: one goes by undecided, then 3, 7, 15
    assert asked == [0, 3] * 5


def test_experts_that_stay() -> None:
    """An expert that every token takes comes to stay: it has the place of one that nobody takes.
    Nothing else could bring it, since a swap between steps would have to pay for its copy."""
    stream = stream_of(sure(replace(SLOW_CPU, link=1e6)))  # all that is cold is sent
    model = layers(stream, gpu_panels="keep")
    seconds = iter(range(1000))
    options = OnlineOptions(half_life_pairs=16, payback_pairs=1e9, keep_panels=True)
    online = OnlinePlacement(model, options, lambda: float(next(seconds)))
    before = hybrid_moe.metrics()
    for seed in range(30):
        for w in model:
            batch = signature_batch(2, seed)
            batch.ids[:] = torch.tensor([5, 1 + seed % 3, -1])
            assert torch.equal(w.forward(*batch.args), signatures(batch))
        assert online.step() == 0
    found, report = hybrid_moe.metrics() - before, online.report()
    assert [w.gpu_experts_mask.nonzero().flatten().tolist() for w in model] == [[5], [5]]
    assert found.stays == found.promotions == found.demotions == report.stays == report.swaps == 2
    assert report.moved_bytes == found.moved_bytes > 0
    del online
    batch = signature_batch(2, 0)
    assert torch.equal(model[0].forward(*batch.args), signatures(batch))


def test_a_stay_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves any more; the expert is sent for the batch, as if it had not been tried."""
    stream = stream_of(sure(replace(SLOW_CPU, link=1e6)))
    (w,) = layers(stream, 1)
    online = OnlinePlacement([w], OnlineOptions())
    online._use[:, 0, 3] = 1e3

    def fail(*_: object) -> None:
        raise RuntimeError("the cable is out")

    monkeypatch.setattr(ExpertPlacement, "promote", fail)
    batch = signature_batch(1, 0)
    batch.ids[:] = torch.tensor([3, 0, 6])
    for _ in range(2):
        assert torch.equal(w.forward(*batch.args), signatures(batch))
    assert not w.gpu_experts_mask.any(), "expert 0 had made room"
    assert not online.active and online.report().stays == 0
