"""One layer of `timeline.run_step` as compiled arithmetic, for searches that try it thousands of
times. `timeline` explains it; a test holds the two against each other.

    state   now, cpu_free, link_free, carried: seconds of the step
    layer   BEFORE ... LEFT, seconds; see `constants_of`
    part    what of the layer's experts is where: seconds of the CPU's reading and multiplying, now
            and later, experts that are sent, and what they take on the GPU
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hybrid_moe.schedule.layer_demand import LayerDemand
from hybrid_moe.schedule.layer_times import gpu_expert_seconds, gpu_seconds
from hybrid_moe.schedule.layer_work import ExpertWork, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

Floats = npt.NDArray[np.float64]
State = tuple[float, float, float, float]
START: State = (0.0, 0.0, 0.0, 0.0)

BEFORE, BESIDE, SUBMIT, BACK, TRANSFER, LINK, LEFT = range(7)
"""Places in a layer's constants."""
NOW_READ, NOW_MULTIPLY, LATER_READ, LATER_MULTIPLY, SENT, GPU_READ, GPU_FLOPS = range(7)
"""Places in a part."""
READ, MULTIPLY, SENT_READ, SENT_FLOPS = range(4)
"""Columns of the costs of an expert."""


def constants_of(work: LayerWork, demand: LayerDemand, rates: MachineRates) -> Floats:
    """[7] seconds: before the routing; beside the CPU; hand-over there and back; until a copy
    starts; one expert's copy (infinite without a link); and the share of its reading that the CPU
    keeps beside copies."""
    expert = _expert(work)
    beside = gpu_seconds(work.shared, rates) + gpu_expert_seconds(expert, demand.hot, rates)
    left = max(rates.memory - rates.link, rates.memory / 2) / rates.cpu_read
    return np.array(
        [
            rates.launch + gpu_seconds(work.before, rates),
            beside,
            rates.submit,
            rates.back,
            rates.transfer,
            expert.nbytes / rates.link if rates.link else np.inf,
            min(1.0, left),
        ]
    )


def costs_of(work: LayerWork, tokens: npt.ArrayLike, rates: MachineRates) -> Floats:
    """[m, 4] seconds of m experts with so many tokens each: reading and multiplying on the CPU,
    reading and multiplying on the GPU once they are sent."""
    expert, t = _expert(work), np.asarray(tokens, np.float64)
    costs = np.empty((len(t), 4))
    costs[:, READ] = expert.nbytes / rates.cpu_read
    further = np.maximum(t - 1, 0) / expert.many_tokens_rate
    costs[:, MULTIPLY] = expert.weights * (1 / expert.one_token_rate + further)
    costs[:, SENT_READ] = expert.gpu_nbytes / rates.gpu_read
    costs[:, SENT_FLOPS] = 2 * expert.weights * t / rates.gpu_flops
    return costs


def _expert(work: LayerWork) -> ExpertWork:
    if work.expert is None:
        raise ValueError(f"layer {work.layer} has no experts: there is nothing to decide")
    return work.expert


F = TypeVar("F", bound=Callable[..., Any])


def loop(function: F) -> F:
    """`numba.njit(nogil=True)`, typed; numba is imported here, when the first one is needed."""
    from numba import njit

    compiled: F = njit(nogil=True, cache=False)(function)
    return compiled


@cache
def compiled_advance() -> Callable[[State, Floats, Floats], State]:
    """(state, layer [7], part [7]) -> the state after the layer, its sum complete at the first."""
    return loop(advance)


def advance(state: State, layer: Floats, part: Floats) -> State:
    """See `compiled_advance`."""
    now, cpu_free, link_free, carried = state
    known = now + layer[0]
    gpu, copies = known + layer[1], 0.0
    if part[4] > 0:
        copies = layer[4] + part[4] * layer[5]
        link_free = max(link_free, known) + copies
        gpu = max(gpu, link_free) + max(part[5], part[6])
    end = max(gpu, carried)
    carried = 0.0
    first, later = max(part[0], part[1]), max(part[2], part[3])
    if copies > 0 and layer[6] < 1:
        both = first + later
        both = min(both / layer[6], both + (1 - layer[6]) * copies)
        first = min(first / layer[6], first + (1 - layer[6]) * copies)
        later = both - first
    if first > 0 or later > 0:
        cpu_free = max(known + layer[2], cpu_free) + first
        if first > 0:
            end = max(end, cpu_free + layer[3])
        if later > 0:
            cpu_free += later
            carried = cpu_free + layer[3]
    return end, cpu_free, link_free, carried
