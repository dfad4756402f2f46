"""Streamed prefill as a plan has it: how many experts of a layer travel, and the size of a chunk.

Every chunk sends experts anew. So a larger chunk costs less for each token, until the GPU's or the
CPU's arithmetic is the limit; what it takes of the GPU's memory, hot experts do not get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hybrid_moe.planning.plan import Plan
from hybrid_moe.planning.step_work import StepWork
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertSplit, LayerWork
from hybrid_moe.schedule.timeline import StepTimeline, run_step

LINK = 20e9
"""Assumed: bytes a second to a GPU in a PCIe 4 slot, which carries 31.5e9 with headers."""

SHARES = 32
"""Steps in which the share of experts that travel is tried."""

CHUNKS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a chunk that `best_chunk` tries."""

WORTH = 0.97
"""Of the fastest prefill: the smallest chunk that reaches it is taken, for it leaves memory."""


def streamed_step(step: StepWork, memory: int) -> tuple[StepWork, StepTimeline]:
    """The step with the share of cold experts sent for which it is fastest; alike in all layers.

    Args:
        step: of a chunk, nothing sent.
        memory: bytes of the GPU for them, half of it for a layer's.
    """
    rates = replace(step.rates, link=LINK)
    best: tuple[StepWork, StepTimeline] | None = None
    for tried in range(SHARES + 1):
        share = tried / SHARES
        pairs = zip(step.works, step.splits, strict=True)
        splits = tuple(_sent(work, split, share, memory) for work, split in pairs)
        sent = StepWork(step.works, splits, rates)
        line = run_step(sent.times(), early=True)
        if best is None or line.seconds < best[1].seconds:
            best = sent, line
    assert best is not None
    return best


def _sent(work: LayerWork, split: ExpertSplit, share: float, memory: int) -> ExpertSplit:
    if work.expert is None or not split.cpu.experts:
        return split
    room = memory / 2 / work.expert.nbytes
    share = min(share, room / split.cpu.experts)
    sent = ExpertCount(share * split.cpu.experts, share * split.cpu.pairs)
    rest = ExpertCount((1 - share) * split.cpu.experts, (1 - share) * split.cpu.pairs)
    return replace(split, cpu=rest, sent=sent)


def best_chunk(plan_of: Callable[[int], Plan], context: int) -> Plan:
    """The plan with the smallest chunk whose prefill is nearly the fastest of those that fit; that
    of the smallest chunk where none fits.

    Args:
        plan_of: the plan with a chunk of so many tokens.
        context: tokens of the longest request, which no chunk exceeds.
    """
    sizes = [size for size in CHUNKS if size < context] or [min(context, CHUNKS[0])]
    plans = [plan_of(size) for size in sizes]
    fitting = [plan for plan in plans if not plan.shortages]
    if not fitting:
        return plans[0]
    fastest = max(plan.prefill.tokens_per_second for plan in fitting)
    return next(p for p in fitting if p.prefill.tokens_per_second >= WORTH * fastest)
