"""Decode with decisions against the model's optimum, on a machine that is emulated.

    python bench/throttled_steps.py --json FILE

As in `throttled`, jobs, slots, the link's thread, deferral and the planner are real, and each part
waits until the seconds of the timeline are over. Attention is 30 % of a step, and the link is half
as fast as the CPU reads. A step of one token is computed by the CPU alone, with experts sent, and
with two of a token's experts deferred as well. The planner is told rates that are wrong by a factor
of two. The optimum knows the routing of all layers (`schedule.offline_optimum`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness import parser
from rich.console import Console
from rich.table import Table
from throttled import BOTH_HALVES, NBYTES, E, H, I, planner_of, random_batch, throttled_model
from throttled_machine import Measured, ThrottledLink, ThrottledMachine, attend
from tqdm import trange

from hybrid_moe.cpu_kernels.trace import tracing
from hybrid_moe.planning.receipt import receipt, write_receipt
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule.layer_demand import demand_of
from hybrid_moe.schedule.layer_work import ExpertWork, GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.offline_optimum import shortest_step
from hybrid_moe.schedule.step_planner import StepPlanner
from hybrid_moe.wrapper import KTMoEWrapper

WAYS = {"all on the CPU": (False, 0), "sent": (True, 0), "sent or deferred": (True, 2)}
"""Way -> whether experts are sent, and how many of a token may be deferred."""

LEARNING_STEPS = 3
"""That do not count."""


@dataclass(frozen=True)
class StepPoint(Measured):
    """Steps in one way. Seconds of the least disturbed one, and of the best step of that way."""

    way: str
    top_k: int
    layers: int
    seconds: float
    ideal: float
    sent: float


def steps_machine(layer_s: float, top_k: int, attention: float) -> ThrottledMachine:
    """A layer takes `layer_s`, a share of it attention, where the CPU computes all of a token's
    experts."""
    read = top_k * NBYTES / (layer_s * (1 - attention))
    rates = MachineRates(read, 1e18, 1e18, link=read / 2)
    return ThrottledMachine(rates, ExpertWork(NBYTES, NBYTES, 3.0 * H * I, 1e18, 1e18))


def told(machine: ThrottledMachine) -> StepPlanner:
    """The planner, told half the machine's rates: it has to learn them."""
    rates, expert = planner_of(machine).rates, machine.expert
    planner = StepPlanner(rates, expert.one_token_rate, expert.many_tokens_rate)
    planner.prepare()
    return planner


def steps(
    way: str, *, top_k: int, layers: int, layer_s: float, attention: float, count: int
) -> StepPoint:
    """So many steps that count, in one way."""
    sends, deferred = WAYS[way]
    machine = steps_machine(layer_s, top_k, attention)
    batches = [random_batch(1, top_k, seed) for seed in range(layers)]
    with machine.emulated():
        planner, link = told(machine), ThrottledLink(machine)
        stream = PrefillStream(planner_of(machine), 2 * E, link=link, steps=planner)
        model = throttled_model(
            machine,
            layers,
            top_k,
            **BOTH_HALVES,
            gpu_slots=0,
            prefill_stream=stream if sends else None,
            deferral_chain=DeferralChain(),
            max_deferred_experts_per_token=deferred,
        )
        seconds = []
        for step in trange(LEARNING_STEPS + count, desc=way, mininterval=2, leave=False):
            begin = time.monotonic()
            _step(model, batches, attention * layer_s)
            if step >= LEARNING_STEPS:
                seconds.append(time.monotonic() - begin)
        stream.note_all()  # of the last layer, for a trace
        for w in model:
            w.close()
    ideal = ideal_step(machine, batches, attention * layer_s, sends=sends, deferred=deferred)
    sent = stream.sent_bytes / NBYTES / layers / (LEARNING_STEPS + count)
    return StepPoint(way, top_k, layers, min(seconds), ideal, sent)


def _step(model: Sequence[KTMoEWrapper], batches: Sequence[Any], before: float) -> None:
    for w, batch in zip(model, batches, strict=True):
        attend(before, w.layer_idx)
        w.forward(*batch)


def ideal_step(
    machine: ThrottledMachine, batches: Sequence[Any], before: float, *, sends: bool, deferred: int
) -> float:
    """Seconds of the best step by the timeline."""
    rates, expert = machine.rates, machine.expert
    rates = MachineRates(
        rates.cpu_read, rates.gpu_read, rates.gpu_flops, rates.link if sends else 0.0, launch=before
    )
    works = [LayerWork(n, GpuAmount(), expert=expert) for n in range(len(batches))]
    cold = [False] * E
    demands = [demand_of(ids, scores, cold, deferred) for _, ids, scores in batches]
    return shortest_step(works, demands, rates)


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=5, help="that count")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--layer-ms", type=float, default=40.0)
    options.add_argument("--trace", help="only write a trace there, of decided steps")
    args = options.parse_args()
    common = {"layers": args.layers, "layer_s": args.layer_ms / 1e3, "attention": 0.3}
    if args.trace:
        with tracing(args.trace):
            steps("sent or deferred", top_k=6, count=1, **common)
        return
    points = [steps(way, top_k=k, count=args.steps, **common) for k in (4, 8) for way in WAYS]
    console = Console(width=110)
    table = Table("experts of a token", "decode", "ms a step", "ideal", "ratio", "sent of a layer")
    for p in points:
        row = (f"{1e3 * p.seconds:.1f}", f"{1e3 * p.ideal:.1f}", f"{p.ratio:.3f}", f"{p.sent:.1f}")
        table.add_row(f"{p.top_k}", p.way, *row)
    console.print(table)
    if args.json:
        found = [asdict(p) for p in points]
        write_receipt(args.json, receipt("throttled_steps", points=found))


if __name__ == "__main__":
    main()
