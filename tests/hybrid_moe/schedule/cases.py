"""Random layers, demands and machines for tests of the timeline and its decisions."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hybrid_moe.schedule.layer_demand import LayerDemand
from hybrid_moe.schedule.layer_times import LayerTimes
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertWork, GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

RATES = MachineRates(
    60e9, 700e9, 60e12, link=25e9, memory=75e9, submit=15e-6, back=10e-6, transfer=8e-6, launch=5e-6
)
EXPERT = ExpertWork(13.4e6, 13.0e6, 25.2e6, 1.5e12, 0.9e12)

_SECONDS = st.integers(0, 40).map(lambda n: n * 1e-5)


@st.composite
def steps(draw: st.DrawFn) -> list[LayerTimes]:
    """Layers of a step; the last one with experts defers nothing."""
    count = draw(st.integers(1, 6))
    routed = [draw(st.booleans()) for _ in range(count)]
    last = max((n for n, value in enumerate(routed) if value), default=-1)
    layers = []
    for number in range(count):
        if not routed[number]:
            layers.append(LayerTimes(number, draw(_SECONDS), draw(_SECONDS), routed=False))
            continue
        sends = draw(st.booleans())
        layers.append(
            LayerTimes(
                number,
                before=draw(_SECONDS),
                beside=draw(_SECONDS),
                link=draw(_SECONDS) + 1e-6 if sends else 0.0,
                sent=draw(_SECONDS) if sends else 0.0,
                submit=draw(_SECONDS),
                cpu=draw(_SECONDS),
                deferred=draw(_SECONDS) if number < last else 0.0,
                back=draw(_SECONDS),
            )
        )
    return layers


def work(layer: int = 0, attention: float = 70e6) -> LayerWork:
    """A layer with attention and a shared expert."""
    return LayerWork(layer, GpuAmount(attention), GpuAmount(13.4e6), EXPERT)


@st.composite
def demands(draw: st.DrawFn, most: int = 4, tokens: int = 3) -> LayerDemand:
    """A few cold experts with a few tokens each, and some hot ones."""
    m = draw(st.integers(0, most))
    hot = draw(st.integers(0, 3))
    return LayerDemand(
        hot=ExpertCount(float(hot), float(hot)),
        experts=np.arange(m, dtype=np.int64),
        tokens=np.array([draw(st.integers(1, tokens)) for _ in range(m)], np.int64),
        weight=np.array([draw(st.floats(0.01, 1)) for _ in range(m)], np.float64),
        deferrable=np.array([draw(st.booleans()) for _ in range(m)], bool),
    )


@st.composite
def machines(draw: st.DrawFn) -> MachineRates:
    """Of all kinds: links slower and faster than memory, copies that take bandwidth or do not."""
    return MachineRates(
        cpu_read=draw(st.sampled_from([20e9, 60e9, 300e9])),
        gpu_read=draw(st.sampled_from([300e9, 1500e9])),
        gpu_flops=60e12,
        link=draw(st.sampled_from([0.0, 8e9, 25e9, 200e9])),
        memory=draw(st.sampled_from([65e9, float("inf")])),
        submit=draw(st.sampled_from([0.0, 20e-6])),
        back=draw(st.sampled_from([0.0, 20e-6])),
        transfer=draw(st.sampled_from([0.0, 10e-6])),
        launch=draw(st.sampled_from([0.0, 50e-6])),
    )
