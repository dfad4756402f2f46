"""The timeline of a step against the definition: a task starts when its lane and what it needs are
done."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.schedule.layer_times import LayerTimes, layer_times, stretched
from hybrid_moe.schedule.layer_work import (
    ExpertCount,
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
)
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.timeline import CPU, GPU, LINK, run_step
from tests.hybrid_moe.schedule.cases import RATES, steps


def longest_path(layers: list[LayerTimes], early: bool, buffers: int) -> float:
    """The step's end as the longest path through its tasks; each says what it waits for."""
    routed = [n for n, layer in enumerate(layers) if layer.routed]
    senders = [n for n, layer in enumerate(layers) if layer.link]
    workers = [n for n, layer in enumerate(layers) if layer.cpu or layer.deferred]

    @cache
    def end(task: str, n: int) -> float:
        if n < 0:
            return 0.0
        layer = layers[n]
        if task == "before":
            return end("sum", n - 1) + layer.before
        if task == "copies":
            place = senders.index(n)
            waits = [end("copies", senders[place - 1]) if place else 0.0]
            if early:
                waits.append(end("sent", senders[place - buffers]) if place >= buffers else 0.0)
            else:
                waits.append(end("before", n))
            return max(waits) + layer.link
        if task == "beside":
            return end("before", n) + layer.beside
        if task == "sent":
            waits = [end("beside", n), *([end("copies", n)] if layer.link else [])]
            return max(waits) + layer.sent
        if task == "now":
            place = workers.index(n)
            free = end("later", workers[place - 1]) if place else 0.0
            return max(end("before", n) + layer.submit, free) + layer.cpu
        if task == "later":
            return end("now", n) + layer.deferred
        assert task == "sum"
        waits = [end("sent", n)]
        if layer.cpu:
            waits.append(end("now", n) + layer.back)
        if layer.routed:
            before = routed[routed.index(n) - 1] if routed.index(n) else -1
            if before >= 0 and layers[before].deferred:
                waits.append(end("later", before) + layers[before].back)
        return max(waits)

    return end("sum", len(layers) - 1)


@given(steps(), st.booleans(), st.integers(1, 3))
def test_a_step_is_its_longest_path(layers: list[LayerTimes], early: bool, buffers: int) -> None:
    line = run_step(layers, early=early, buffers=buffers)
    assert line.seconds == pytest.approx(longest_path(layers, early, buffers), abs=1e-12)
    assert line.seconds == line.ends[-1]
    assert run_step(layers, early=early, buffers=buffers, after=1.0).seconds == line.seconds + 1


@given(steps(), st.booleans())
def test_a_lane_does_one_thing_at_a_time(layers: list[LayerTimes], early: bool) -> None:
    line = run_step(layers, early=early)
    for lane in (GPU, LINK, CPU):
        spans = [span for span in line.spans if span.lane == lane]
        for one, other in itertools.pairwise(spans):
            assert one.end <= other.start + 1e-15
    busy = sum(layer.before + layer.beside + layer.sent for layer in layers)
    assert line.busy(GPU) == pytest.approx(busy)
    assert line.idle == pytest.approx(line.seconds - busy, abs=1e-12)


@given(steps(), st.data())
def test_nothing_gets_shorter_by_taking_longer(
    layers: list[LayerTimes], data: st.DataObject
) -> None:
    n = data.draw(st.integers(0, len(layers) - 1))
    names = [f.name for f in fields(LayerTimes) if isinstance(getattr(layers[n], f.name), float)]
    name = data.draw(st.sampled_from([x for x in names if x not in ("deferred", "link")]))
    longer = [*layers]
    longer[n] = replace(layers[n], **{name: getattr(layers[n], name) + 1e-4})
    assert run_step(longer).seconds >= run_step(layers).seconds - 1e-15


def test_deferred_experts_run_under_the_attention_of_the_next_layer() -> None:
    """Attention 30, experts 70: 100 a layer. With 30 deferred the CPU never waits: 70 a layer, but
    for the first attention; the last layer has all 70."""
    plain = [LayerTimes(n, before=30.0, cpu=70.0) for n in range(10)]
    deferring = [replace(t, cpu=40.0, deferred=30.0) for t in plain[:-1]]
    assert run_step(plain).seconds == 1000
    assert run_step([*deferring, plain[-1]]).seconds == 30 + 10 * 70
    line = run_step([*deferring, plain[-1]])
    assert line.busy(CPU) == 700 and line.idle == line.seconds - 300


def test_the_last_layer_cannot_defer() -> None:
    dense = LayerTimes(2, before=1.0, routed=False)
    with pytest.raises(ValueError, match="layer 1 defers experts, but no layer after it"):
        run_step([LayerTimes(0, cpu=1.0), LayerTimes(1, cpu=1.0, deferred=1.0), dense])
    with pytest.raises(ValueError, match="needs layers and buffers"):
        run_step([])
    with pytest.raises(ValueError, match="needs layers and buffers"):
        run_step([dense], buffers=0)


def test_copies_that_start_early_hide_behind_the_layers_before() -> None:
    """Two buffers: copies of a layer begin when those of the layer before have arrived and the
    layer before that has computed."""
    layers = [LayerTimes(n, before=10.0, link=20.0, sent=5.0) for n in range(4)]
    assert run_step(layers).seconds == 4 * 35
    assert run_step(layers, early=True).seconds == 4 * 20 + 5
    assert run_step(layers, early=True, buffers=1).seconds == 4 * 25


def test_parts_of_a_layer() -> None:
    """Each from its formula; numbers by hand."""
    rates = MachineRates(
        cpu_read=50e9, gpu_read=500e9, gpu_flops=1e12, link=10e9, submit=1e-6, back=2e-6,
        transfer=3e-6, launch=4e-6,
    )  # fmt: skip
    expert = ExpertWork(10e6, 5e6, 20e6, one_token_rate=1e12, many_tokens_rate=4e11)
    work = LayerWork(7, GpuAmount(50e6, 1e6), GpuAmount(1e6, 5e7), expert)
    split = ExpertSplit(
        hot=ExpertCount(2, 2), cpu=ExpertCount(3, 3), sent=ExpertCount(1, 4),
        deferred=ExpertCount(1, 100),
    )  # fmt: skip
    times = layer_times(work, split, rates)
    assert times.before == pytest.approx(4e-6 + 50e6 / 500e9)
    assert times.beside == pytest.approx(5e7 / 1e12 + 2 * 2 * 20e6 / 1e12)
    assert times.link == pytest.approx(3e-6 + 10e6 / 10e9)
    assert times.sent == pytest.approx(2 * 4 * 20e6 / 1e12)
    assert times.cpu == pytest.approx(3 * 10e6 / 50e9)
    assert times.deferred == pytest.approx(20e6 / 1e12 + 99 * 20e6 / 4e11)
    assert (times.submit, times.back, times.routed) == (1e-6, 2e-6, True)
    all_hot = layer_times(work, ExpertSplit(hot=ExpertCount(6, 6)), rates)
    assert (all_hot.submit, all_hot.cpu, all_hot.back, all_hot.link) == (0, 0, 0, 0)
    assert all_hot.alone == all_hot.before + all_hot.beside


@given(steps())
def test_a_layer_alone_is_a_step_of_one_layer(layers: list[LayerTimes]) -> None:
    for times in layers:
        one = replace(times, deferred=0.0)
        assert run_step([one]).seconds == pytest.approx(one.alone)


def test_dense_layers_have_no_experts() -> None:
    dense = LayerWork(0, GpuAmount(1e6))
    assert not layer_times(dense, ExpertSplit(), RATES).routed
    with pytest.raises(ValueError, match="layer 0 has no experts"):
        layer_times(dense, ExpertSplit(cpu=ExpertCount(1, 1)), RATES)
    sends = ExpertSplit(sent=ExpertCount(1, 1))
    with pytest.raises(ValueError, match="rate of the link is 0"):
        expert = ExpertWork(1, 1, 1, 1, 1)
        layer_times(LayerWork(0, GpuAmount(), expert=expert), sends, replace(RATES, link=0.0))


def test_copies_take_bandwidth_from_the_cpu() -> None:
    rates = MachineRates(80e9, 1e12, 1e14, link=20e9, memory=90e9)
    assert stretched(1.0, 0.0, rates) == 1
    assert stretched(7.0, 100.0, rates) == pytest.approx(8)  # 70 of 80 GB/s are left
    assert stretched(10.0, 8.0, rates) == pytest.approx(11)  # for 8 s, an eighth of them is lost
    assert stretched(7.0, 100.0, replace(rates, memory=100e9)) == 7
    # bytes add up: the CPU's and the link's, at what memory gives to both
    total = 7.0 * 80e9 + 8.0 * 20e9
    assert stretched(7.0, 8.0, rates) == pytest.approx(total / 90e9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_read", 0.0), ("gpu_read", -1.0), ("memory", float("nan")), ("link", -1.0),
     ("submit", float("inf")), ("back", -1e-9)],
)  # fmt: skip
def test_rates_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, must be"):
        replace(RATES, **{name: value})
