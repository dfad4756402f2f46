"""What drafts gain with experts on the CPU, and what the gate makes of it.

    python bench/speculation.py

Routing and drafts are those of the small model on three texts (`regret.py --record`): the draft is
its first layer alone. A step of 1 + n tokens meets the experts that n + 1 consecutive tokens of the
trace took; its time is the timeline's, for the machines of `regret.py`. Fixed lengths and the gate
then read the same texts, many times over, since they are short.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from regret import EXPERT, MACHINES, TEXTS, RoutingTrace, read_trace, works
from rich.console import Console
from rich.table import Table

from hybrid_moe.schedule.draft_gate import DraftGate
from hybrid_moe.schedule.layer_times import layer_times
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertSplit, uniform_met
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.timeline import run_step

LONGEST = 4
LAYERS = 40
DRAFT = 1 / LAYERS
"""Of a step of one token: a draft of one layer of so many."""
TOKENS = 4096
"""That are read, the text again and again."""


def met(trace: RoutingTrace, tokens: int) -> ExpertCount:
    """Experts that so many consecutive tokens take in a layer, on average."""
    T, L, k = trace.ids.shape
    counts = [
        len(np.unique(trace.ids[start : start + tokens, layer]))
        for start in range(0, T - tokens, tokens)
        for layer in range(L)
    ]
    return ExpertCount(float(np.mean(counts)), float(tokens * k))


def step_seconds(trace: RoutingTrace, rates: MachineRates) -> Callable[[int], float]:
    """Tokens in a step -> its seconds, all experts on the CPU."""

    @cache
    def seconds(tokens: int) -> float:
        split = ExpertSplit(cpu=met(trace, tokens))
        return run_step([layer_times(work, split, rates) for work in works(LAYERS)]).seconds

    return seconds


def read_text(trace: RoutingTrace, gate: DraftGate, fixed: int | None = None) -> float:
    """Seconds of `TOKENS` tokens, with drafts of one length or of the gate's."""
    seconds, place = 0.0, 0
    while place < TOKENS:
        drafted = gate.length if fixed is None else fixed
        accepted = 0
        while accepted < drafted and trace.agreed[(place + accepted) % len(trace.agreed)]:
            accepted += 1
        took = gate.seconds(drafted)
        seconds += took
        if fixed is None:
            gate.note(drafted, accepted, took)
        place += 1 + accepted
    return seconds * TOKENS / place


def new_gate(trace: RoutingTrace, rates: MachineRates) -> DraftGate:
    """A gate that knows nothing of the text yet."""
    seconds = step_seconds(trace, rates)
    return DraftGate(seconds, DRAFT * seconds(1), LONGEST)


def main() -> None:
    """Print both tables."""
    texts = Table("text", "drafts right", *(f"experts of {n + 1}" for n in range(LONGEST + 1)))
    for name in TEXTS:
        trace = read_trace(name)
        E, k = trace.num_experts, trace.ids.shape[2]
        counts = [
            f"{met(trace, n + 1).experts:.1f} ({uniform_met(E, E, k, n + 1).experts:.1f})"
            for n in range(LONGEST + 1)
        ]
        texts.add_row(name, f"{trace.agreed.mean():.0%}", *counts)
    Console().print(texts, "in brackets: if tokens and experts had nothing to do with each other")
    speeds = Table("machine", "text", *(f"draft {n}" for n in range(1, LONGEST + 1)), "gate")
    for machine, rates in MACHINES.items():
        for name in TEXTS:
            trace = read_trace(name)
            plain = read_text(trace, new_gate(trace, rates), 0)
            lengths = [*range(1, LONGEST + 1), None]
            found = [plain / read_text(trace, new_gate(trace, rates), n) for n in lengths]
            speeds.add_row(machine, name, *(f"{value:.2f}" for value in found))
    Console().print(speeds, f"speed over that without drafts; experts of {EXPERT.nbytes / 1e6} MB")


if __name__ == "__main__":
    main()
