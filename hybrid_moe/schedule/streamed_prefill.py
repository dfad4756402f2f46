"""Experts that travel, as engines ask for it: `HYBRID_MOE_STREAM_PREFILL=SIZE`.

SIZE is memory of the GPU for experts on their way (`runtime.prefill_stream`). Rates of the machine
need not be known: those below are of a desktop with a PCIe 4 card, and the planners replace them by
what they measure, from the second layer of the first long prompt, and of the first step of decode,
on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.prefill_planner import PrefillPlanner
from hybrid_moe.schedule.step_planner import StepPlanner
from hybrid_moe.text import parse_size

VARIABLE = "HYBRID_MOE_STREAM_PREFILL"
"""Environment variable: memory of the GPU for experts on their way, such as 2GiB; without it the
CPU computes all cold experts."""

ASSUMED = MachineRates(
    cpu_read=50e9, gpu_read=500e9, gpu_flops=40e12, link=20e9, submit=50e-6, back=20e-6
)
"""Until there are measurements."""

ASSUMED_MACS = 200e9, 500e9
"""The same: multiply-accumulates of the CPU, of an expert's first token and of each further one."""


def stream_memory(environ: Mapping[str, str] = os.environ) -> int | None:
    """Bytes that the variable names; None where it is not set.

    Raises:
        ValueError: it is no size.
    """
    text = environ.get(VARIABLE)
    if not text:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error


def new_prefill_stream(memory: int, rates: MachineRates = ASSUMED) -> PrefillStream:
    """For the layers of one model on one device.

    Args:
        memory: bytes of the device for experts on their way.
    """
    steps = StepPlanner(rates, *ASSUMED_MACS)
    steps.prepare()
    return PrefillStream(PrefillPlanner(rates, *ASSUMED_MACS), memory=memory, steps=steps)
