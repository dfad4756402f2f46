"""The depth for a batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hybrid_moe.schedule.deferral_depth import choose_depth
from hybrid_moe.schedule.layer_times import LayerTimes, layer_times
from hybrid_moe.schedule.layer_work import (
    ExpertCount,
    ExpertSplit,
    GpuAmount,
    LayerWork,
    uniform_deferred,
    uniform_met,
)
from hybrid_moe.schedule.machine_rates import MachineRates
from tests.hybrid_moe.schedule.cases import EXPERT, work

EACH = EXPERT.nbytes / 50e9
"""Seconds of one expert."""


def uniform_times(
    works: Sequence[LayerWork],
    rates: MachineRates,
    *,
    num_experts: int,
    hot: int,
    top_k: int,
    tokens: int,
    depth: int,
) -> list[LayerTimes]:
    """Layers of a batch whose experts are all equally likely, `hot` of each on the GPU."""
    cold = num_experts - hot
    met = uniform_met(cold, num_experts, top_k, tokens)
    later = uniform_deferred(cold, num_experts, top_k, tokens, depth)
    now = ExpertCount(met.experts - later.experts, met.pairs - later.pairs)
    split = ExpertSplit(hot=uniform_met(hot, num_experts, top_k, tokens), cpu=now, deferred=later)
    last = max((place for place, each in enumerate(works) if each.expert is not None), default=-1)
    times = []
    for place, each in enumerate(works):
        if each.expert is None:
            times.append(layer_times(each, ExpertSplit(), rates))
        elif place == last:
            times.append(layer_times(each, replace(split, cpu=met, deferred=ExpertCount()), rates))
        else:
            times.append(layer_times(each, split, rates))
    return times


def at(depth: int, layers: int, tokens: int, attention: float) -> list[LayerTimes]:
    rates = MachineRates(50e9, 500e9, 1e15)
    works = [
        LayerWork(n, GpuAmount(attention * EACH * 500e9), expert=EXPERT) for n in range(layers)
    ]
    return uniform_times(works, rates, num_experts=64, hot=0, top_k=6, tokens=tokens, depth=depth)


def test_the_smallest_depth_that_hides_attention() -> None:
    """Attention takes as long as 1.5 experts: two of six must be deferred."""
    choice = choose_depth(lambda depth: at(depth, 40, 1, 1.5), 6)
    assert choice.depth == 2
    assert choice.seconds[0] == pytest.approx(40 * 7.5 * EACH)
    assert choice.seconds[2] == pytest.approx((1.5 + 40 * 6) * EACH)
    assert choice.speedup == pytest.approx(300 / 241.5)
    assert choose_depth(lambda depth: at(depth, 40, 1, 1.5), 1).depth == 1
    assert choose_depth(lambda depth: at(depth, 40, 1, 0.0), 6).depth == 0
    assert choose_depth(lambda depth: at(depth, 1, 1, 1.5), 6).depth == 0  # no layer after it


def test_large_batches_defer_next_to_nothing() -> None:
    one, many = at(2, 4, 1, 1.0)[0], at(2, 4, 64, 1.0)[0]
    assert one.deferred / one.cpu == pytest.approx(2 / 4)
    assert many.deferred / many.cpu < 0.03


def test_layers_without_experts_and_errors() -> None:
    rates = MachineRates(50e9, 500e9, 1e15)
    works = [LayerWork(0, GpuAmount(1e6)), work(1), LayerWork(2, GpuAmount(1e6)), work(3)]
    times = uniform_times(works, rates, num_experts=8, hot=4, top_k=2, tokens=1, depth=1)
    assert [t.routed for t in times] == [False, True, False, True]
    assert times[1].deferred == pytest.approx(EACH / 2) and times[3].deferred == 0
    with pytest.raises(ValueError, match="most is -1"):
        choose_depth(lambda _depth: times, -1)
