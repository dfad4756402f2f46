"""The runtime's schedule against the model's ideal, on a machine that is emulated.

    python bench/throttled.py --json FILE

`throttled_machine` says what is real and what is not. Three scenarios:

    prefill   chunks of a prompt at the balanced point, where the CPU alone and the link alone would
              take equally long: all experts on the CPU, all sent, and streamed by the planner
    decode    one token at a time, attention 30 % of a step, with and without 2 deferred experts
    moves     experts promoted and demoted one by one, as large as those of prefill

The ideal is the timeline's (`run_step`), with the best number of experts sent for each layer; of a
move it is its bytes over the link.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import parser
from rich.console import Console
from rich.table import Table
from throttled_machine import (
    Measured,
    ThrottledLink,
    ThrottledMachine,
    attend,
    throttled_wrapper,
    until,
)
from tqdm import trange

from hybrid_moe.cpu_kernels.trace import tracing
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.planning.receipt import receipt, write_receipt
from hybrid_moe.runtime.deferral import DeferralChain
from hybrid_moe.runtime.prefill_loads import PrefillLoad, PrefillTimes, SendChoice
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule.layer_times import (
    LayerTimes,
    cpu_seconds,
    gpu_expert_seconds,
    link_seconds,
)
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.prefill_planner import PrefillPlanner
from hybrid_moe.schedule.timeline import run_step
from hybrid_moe.wrapper import KTMoEWrapper

E, K, H, I = 32, 6, 64, 32
"""The layers that really compute."""

NBYTES = float(packed_nbytes(MXFP4, H, I))
"""Of one expert."""

WAYS = ("all CPU", "all sent", "streamed")


@dataclass(frozen=True)
class PrefillPoint(Measured):
    """Chunks in one way. Seconds of the least disturbed one, and the ideal of the way."""

    way: str
    layers: int
    tokens: int
    attention: float
    seconds: float
    ideal: float
    sent: float


@dataclass(frozen=True)
class DecodePoint:
    """Steps with one top-k. Seconds of a step without and with deferral, and both ideals."""

    top_k: int
    layers: int
    deferred: int
    plain: float
    scheduled: float
    plain_ideal: float
    ideal: float

    @property
    def faster(self) -> float:
        """Without over with."""
        return self.plain / self.scheduled

    @property
    def share(self) -> float:
        """Of the ideal's gain that is reached, as a speed."""
        return self.ideal / self.scheduled


@dataclass(frozen=True)
class MovePoint(Measured):
    """So many experts moved in a row. Seconds of each until all are there, median; and those of its
    bytes over the link."""

    move: str
    experts: int
    seconds: float
    ideal: float


class SendAll:
    """The planner of those who leave the CPU idle: every expert travels, as early as it can."""

    def choose(self, now: PrefillLoad, following: PrefillLoad | None, queued: float) -> SendChoice:
        late = min(len(now.cold), now.room)
        ahead = 0 if following is None else min(len(following.cold), following.room)
        return SendChoice(late, ahead)

    def note(self, times: PrefillTimes) -> None:
        """It learns nothing."""

    def note_link(self, nbytes: int, seconds: float) -> None:
        """It learns nothing."""


def random_batch(tokens: int, top_k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, ids that lean towards some experts, and weights."""
    rng = torch.Generator().manual_seed(seed)
    lean = torch.linspace(1, 2, E)
    scores = torch.rand(tokens, E, generator=rng) ** (1 / lean)
    ids = scores.argsort(dim=1, descending=True)[:, :top_k].contiguous()
    hidden = torch.randn(tokens, H, generator=rng).to(torch.bfloat16)
    return hidden, ids, torch.rand(tokens, top_k, generator=rng)


@functools.cache
def weights() -> tuple[torch.Tensor, ...]:
    """Of every layer."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return tuple(torch.randn(shape, generator=rng) for shape in shapes)


def sizes(top_k: int) -> dict[str, Any]:
    """Arguments of each wrapper."""
    return {
        "num_experts": E,
        "num_experts_per_tok": top_k,
        "hidden_size": H,
        "moe_intermediate_size": I,
        "cpuinfer_threads": 1,
        "threadpool_count": 1,
    }


def balanced_machine(layer_s: float, tokens: int) -> ThrottledMachine:
    """All experts of a layer take `layer_s` on the CPU, whose arithmetic is the limit, and as long
    on the link; the GPU computes them in a twentieth of that."""
    nbytes, macs = NBYTES, 3.0 * H * I
    rate = tokens * K * macs / layer_s
    rates = MachineRates(
        cpu_read=20 * E * nbytes / layer_s,
        gpu_read=400 * E * nbytes / layer_s,
        gpu_flops=2 * tokens * K * macs / (layer_s / 20),
        link=E * nbytes / layer_s,
    )
    return ThrottledMachine(rates, ExpertWork(nbytes, nbytes, macs, rate, rate))


BOTH_HALVES = {"gpu_backend": "torch", "gpu_device": "cpu"}
"""Options of layers that compute hot experts too."""


def throttled_model(
    machine: ThrottledMachine, layers: int, top_k: int, **options: Any
) -> list[KTMoEWrapper]:
    """Loaded layers on the emulated machine."""
    model = [
        throttled_wrapper(machine, layer_idx=index, **options, **sizes(top_k))
        for index in range(layers)
    ]
    for w in model:
        w.load_weights_from_tensors(*weights())
    return model


def prefill(
    way: str, *, layers: int, tokens: int, layer_s: float, attention: float, chunks: int
) -> PrefillPoint:
    """Chunks of a prompt in one way; the first chunk, in which the planner learns, is left out.

    Args:
        layer_s: see `balanced_machine`.
        attention: of `layer_s`, on the GPU before each layer's routing is known.
    """
    machine = balanced_machine(layer_s, tokens)
    stream = None
    with machine.emulated():
        if way != "all CPU":
            planner = SendAll() if way == "all sent" else planner_of(machine)
            link = ThrottledLink(machine)
            stream = PrefillStream(planner, 2 * E, tokens=2, link=link)
        model = throttled_model(
            machine, layers, K, **BOTH_HALVES, gpu_slots=0, prefill_stream=stream
        )
        batches = [random_batch(tokens, K, seed) for seed in range(layers)]
        seconds = []
        for chunk in trange(chunks + 1, desc=f"prefill, {way}", mininterval=2, leave=False):
            begin = time.monotonic()
            for w, batch in zip(model, batches, strict=True):
                attend(attention * layer_s, w.layer_idx)
                w.forward(*batch)
            if chunk:
                seconds.append(time.monotonic() - begin)
        sent = 0.0
        if stream is not None:
            stream.note_all()  # of the last layer, for a trace
            sent = stream.sent_bytes / NBYTES / layers / (chunks + 1)
        for w in model:
            w.close()
    counts = [torch.bincount(ids.flatten(), minlength=E).tolist() for _, ids, _ in batches]
    ideal = prefill_ideal(machine, counts, attention * layer_s, way)
    return PrefillPoint(way, layers, tokens, attention, min(seconds), ideal, sent)


def planner_of(machine: ThrottledMachine) -> PrefillPlanner:
    """The planner, told half the machine's rates: it has to learn them."""
    rates, expert = machine.rates, machine.expert
    told = MachineRates(rates.cpu_read / 2, rates.gpu_read / 2, rates.gpu_flops / 2, rates.link / 2)
    return PrefillPlanner(told, expert.one_token_rate / 2, expert.many_tokens_rate / 2)


def prefill_ideal(
    machine: ThrottledMachine, counts: Sequence[Sequence[int]], before: float, way: str
) -> float:
    """Seconds of the timeline for one chunk, with the best number of experts sent for each layer
    ("streamed"), all, or none."""
    expert, rates = machine.expert, machine.rates

    @functools.cache
    def times(layer: int, sent: int) -> LayerTimes:
        pairs = sorted((n for n in counts[layer] if n), reverse=True)
        rest = ExpertCount(len(pairs) - sent, sum(pairs[sent:]))
        travel = ExpertCount(sent, sum(pairs[:sent]))
        return LayerTimes(
            layer,
            before=before,
            link=link_seconds(expert, sent, rates),
            sent=gpu_expert_seconds(expert, travel, rates) if sent else 0.0,
            cpu=cpu_seconds(expert, rest, rates) if rest.experts else 0.0,
        )

    def seconds(split: Sequence[int]) -> float:
        return run_step([times(at, n) for at, n in enumerate(split)], early=True).seconds

    most = [sum(n > 0 for n in row) for row in counts]
    if way != "streamed":
        return seconds([0] * len(most) if way == "all CPU" else most)
    split = min(([min(n, m) for m in most] for n in range(max(most) + 1)), key=seconds)
    better = True
    while better:  # one layer at a time, until none can be better
        better = False
        for at, here in enumerate(list(split)):
            for n in {max(0, here - 1), min(most[at], here + 1)}:
                other = [*split[:at], n, *split[at + 1 :]]
                if seconds(other) < seconds(split) - 1e-9:
                    split, better = other, True
    return seconds(split)


def decode(
    top_k: int, *, layers: int, deferred: int, layer_s: float, attention: float, steps: int
) -> DecodePoint:
    """Steps of one token with and without deferred experts.

    Args:
        layer_s: of a layer without deferral, attention and experts.
        attention: share of that, on the GPU.
    """
    nbytes = NBYTES
    read = top_k * nbytes / (layer_s * (1 - attention))
    expert = ExpertWork(nbytes, nbytes, 3.0 * H * I, 1e18, 1e18)
    before = layer_s * attention
    found = []
    for count in (0, min(deferred, top_k)):
        machine = ThrottledMachine(MachineRates(read, 1e18, 1e18), expert)
        options = {"max_deferred_experts_per_token": count, "deferral_chain": DeferralChain()}
        model = throttled_model(machine, layers, top_k, **options)
        found.append(_steps(model, machine, before, steps, top_k))
        for w in model:
            w.close()

    def ideal(count: int) -> float:
        rates = MachineRates(read, 1e18, 1e18)

        def of(experts: int) -> float:
            return cpu_seconds(expert, ExpertCount(experts, experts), rates) if experts else 0.0

        step = [
            LayerTimes(at, before=before, cpu=of(top_k - count), deferred=of(count))
            for at in range(layers - 1)
        ]
        return run_step([*step, LayerTimes(layers - 1, before=before, cpu=of(top_k))]).seconds

    plain, scheduled = found
    return DecodePoint(
        top_k, layers, deferred, plain, scheduled, ideal(0), ideal(min(deferred, top_k))
    )


def _steps(
    model: Sequence[KTMoEWrapper], machine: ThrottledMachine, before: float, steps: int, top_k: int
) -> float:
    """Seconds of the least disturbed step; the first one starts the threads."""
    seconds = []
    batches = [random_batch(1, top_k, seed) for seed in range(len(model))]
    for step in trange(steps + 1, desc=f"decode, top {top_k}", mininterval=2, leave=False):
        begin = time.monotonic()
        for w, batch in zip(model, batches, strict=True):
            attend(before, w.layer_idx)
            w.submit_forward(*batch)
            w.sync_forward(batch[0])
        if step:
            seconds.append(time.monotonic() - begin)
    return min(seconds)


def moves(layer_s: float, rounds: int) -> list[MovePoint]:
    """Experts of a layer come to the GPU and go back: each alone, and half of them in a row.

    Args:
        layer_s: see `balanced_machine`.
    """
    machine = balanced_machine(layer_s, 1)
    ideal, found = NBYTES / machine.rates.link, list[MovePoint]()
    with machine.emulated():
        (layer,) = throttled_model(machine, 1, K, **BOTH_HALVES, gpu_slots=E // 2)
        for count in (1, E // 2):
            taken: dict[str, list[float]] = {"promote": [], "demote": []}
            for _ in range(rounds * E // 2 // count):
                for move, seconds in taken.items():
                    begin = time.monotonic()
                    for expert in range(count):
                        getattr(layer, move)(expert)
                    until(machine.link_free)
                    seconds.append((time.monotonic() - begin) / count)
            for move, seconds in taken.items():
                found.append(MovePoint(move, count, statistics.median(seconds), ideal))
        layer.close()
    return found


def show_points(
    prefills: Sequence[PrefillPoint], decodes: Sequence[DecodePoint], moved: Sequence[MovePoint]
) -> None:
    """Tables of all."""
    console = Console(width=110)
    table = Table("prefill", "ms a chunk", "ideal", "ratio", "experts sent of a layer")
    for p in prefills:
        row = (f"{1e3 * p.seconds:.1f}", f"{1e3 * p.ideal:.1f}", f"{p.ratio:.3f}", f"{p.sent:.1f}")
        table.add_row(p.way, *row)
    console.print(table)
    best = min(p.seconds for p in prefills[:2])
    console.print(f"streamed is {best / prefills[2].seconds:.2f} x faster than the better of both")
    table = Table("decode", "ms a step", "deferred 2", "faster", "ideal faster", "of the ideal")
    for d in decodes:
        ideal = d.plain_ideal / d.ideal
        row = (f"{1e3 * d.plain:.1f}", f"{1e3 * d.scheduled:.1f}", f"{d.faster:.2f}")
        table.add_row(f"top {d.top_k}", *row, f"{ideal:.2f}", f"{d.share:.3f}")
    console.print(table)
    table = Table("move", "in a row", "ms an expert", "its bytes over the link", "ratio")
    for m in moved:
        row = (f"{1e3 * m.seconds:.3f}", f"{1e3 * m.ideal:.3f}", f"{m.ratio:.3f}")
        table.add_row(m.move, f"{m.experts}", *row)
    console.print(table)


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--chunks", type=int, default=5, help="chunks, or steps, that count")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--layer-ms", type=float, default=40.0, help="of prefill; decode: a third")
    options.add_argument("--attention", type=float, default=0.1, help="of a layer, in prefill")
    options.add_argument("--trace", help="only write a trace there, of a chunk and of some steps")
    args = options.parse_args()
    layer_s = args.layer_ms / 1e3
    if args.trace:
        with tracing(args.trace):
            prefill(
                "streamed",
                layers=args.layers,
                tokens=256,
                layer_s=layer_s,
                attention=args.attention,
                chunks=1,
            )
            decode(6, layers=args.layers, deferred=2, layer_s=layer_s / 3, attention=0.3, steps=1)
        return
    prefills = [
        prefill(
            way,
            layers=args.layers,
            tokens=256,
            layer_s=layer_s,
            attention=args.attention,
            chunks=args.chunks,
        )
        for way in WAYS
    ]
    decodes = [
        decode(
            k, layers=args.layers, deferred=2, layer_s=layer_s / 3, attention=0.3, steps=args.chunks
        )
        for k in (2, 4, 6, 8)
    ]
    moved = moves(layer_s, args.chunks)
    show_points(prefills, decodes, moved)
    if args.json:
        points = {
            "prefill": [asdict(p) for p in prefills],
            "decode": [asdict(d) for d in decodes],
            "moves": [asdict(m) for m in moved],
        }
        write_receipt(args.json, receipt("throttled", **points))


if __name__ == "__main__":
    main()
