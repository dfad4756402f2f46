"""What placement, metrics and the scheduler cost in every layer and step in which they have nothing
to do, in microseconds.

    python bench/idle_costs.py [--layers 48] [--experts 128] [--steps-per-second 25]

Layers of tiny experts, half of them hot on the torch back end, on CPU tensors; each part alone,
the least of several loops. On a GPU's stream, where graphs are replayed, only what is compiled
and online placement are left.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import fork_join
import torch
from harness import parser
from pool import compiled
from rich.console import Console
from rich.table import Table

from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.placement.online import LOOK_SECONDS, OnlinePlacement
from hybrid_moe.planning.receipt import receipt, write_receipt
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.schedule.streamed_prefill import new_prefill_stream
from hybrid_moe.wrapper import KTMoEWrapper

JOB_ADDITIONS = 6
"""To a layer's counters, of each job: hot and cold pairs, launches, tokens, experts that are read
(`drivers.route`), nanoseconds (`drivers.worker`)."""

H = I = 32
ROUNDS, CALLS = 7, 2000


@dataclass(frozen=True)
class Part:
    """Microseconds of each layer and step."""

    what: str
    us: float


def microseconds(call: Callable[[], Any], calls: int | None = None) -> float:
    """Of a call, the loop around it included."""
    calls = calls or CALLS
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter_ns()
        for _ in itertools.repeat(None, calls):
            call()
        taken.append((time.perf_counter_ns() - begin) / calls / 1e3)
    return min(taken)


def model(layers: int, experts: int) -> list[KTMoEWrapper]:
    """Layers of one model."""
    hot = torch.zeros(experts, dtype=torch.bool)
    hot[: experts // 2] = True
    chain, stream = DeferralChain(), new_prefill_stream(memory=1 << 20)
    weights = [torch.zeros(experts, *shape) for shape in ((I, H), (I, H), (H, I))]
    made = []
    for index in range(layers):
        layer = KTMoEWrapper(
            index, experts, 8, H, I, gpu_experts_mask=hot, cpuinfer_threads=1, gpu_backend="torch",
            gpu_device="cpu", gpu_slots=experts // 2, deferral_chain=chain, prefill_stream=stream,
        )  # fmt: skip
        layer.load_weights_from_tensors(*weights)
        made.append(layer)
    return made


def count_wait() -> None:
    """What `Job.wait` does beside waiting."""
    begin = time.perf_counter_ns()
    TOTALS.waits += 1
    TOTALS.waited_ns += time.perf_counter_ns() - begin


def measure(layers: int, experts: int, steps_per_second: float) -> list[Part]:
    """Each part."""
    wrappers = model(layers, experts)
    runner = wrappers[0]._loaded_runner()
    assert runner._halves is not None and runner._streamed is not None
    _, placement = runner._halves
    streamed, chain = runner._streamed, DeferralChain()
    now = itertools.count()
    looking = OnlinePlacement(wrappers, clock=lambda: float(next(now)))
    waiting = OnlinePlacement(wrappers, clock=lambda: 0.0)
    waiting.step()
    looks = min(1.0, 1 / (LOOK_SECONDS * steps_per_second))
    signal = fork_join.Signal.new()
    loops, calls = compiled(), 100_000
    counted = microseconds(lambda: loops["count_up"](signal.address, JOB_ADDITIONS, calls), calls=1)
    parts = [
        Part("metrics: a job's counters, compiled", counted / calls),
        Part("metrics: a wait's", microseconds(count_wait)),
        Part("placement: has the mask changed", microseconds(runner._mask.look)),
        Part("placement: is it that of the moves", microseconds(placement.check_mask)),
        Part("online placement: a step that does not look", microseconds(waiting.step) / layers),
        Part(
            f"online placement: looks, {looks:.2f} a step",
            microseconds(looking.step, 50) / layers * looks,
        ),
        Part("scheduler: is a batch streamed", microseconds(lambda: streamed.wants(1, None))),
        Part("scheduler: is anything deferred to here", microseconds(lambda: chain.take(0, 1))),
    ]
    for wrapper in wrappers:
        wrapper.close()
    return parts


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--experts", type=int, default=128)
    options.add_argument("--steps-per-second", type=float, default=25.0)
    args = options.parse_args()
    parts = measure(args.layers, args.experts, args.steps_per_second)
    table = Table("each layer and step", "us")
    for part in parts:
        table.add_row(part.what, f"{part.us:.3f}")
    table.add_row("all", f"{sum(part.us for part in parts):.2f}")
    Console(width=100).print(table)
    write_receipt(args.json, receipt("idle_costs", points=[asdict(part) for part in parts]))


if __name__ == "__main__":
    main()
