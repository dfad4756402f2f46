"""How many experts of a token a server defers: what `--quality balanced` comes to on a machine."""

from __future__ import annotations

from dataclasses import replace

from hybrid_moe.planning.plan import Plan
from hybrid_moe.planning.prediction import output_seconds, step_of
from hybrid_moe.schedule.deferral_depth import DepthChoice, choose_depth
from hybrid_moe.schedule.layer_times import LayerTimes, layer_times
from hybrid_moe.schedule.layer_work import ExpertCount, ExpertSplit
from hybrid_moe.schedule.quality import deferral_depth


def decode_depth(plan: Plan, quality: str) -> DepthChoice:
    """For one request, the context half full: no more than `quality` allows, and no more than make
    a token faster.

    Args:
        plan: with a GPU.
        quality: see `schedule.quality`.
    """
    model, request = plan.model, plan.request
    gpus = request.gpus
    held = plan.cache.per_gpu(len(gpus)) / 2
    step = step_of(model, plan.hot, request.cpu, gpus, cache=held)
    top_k = {layer.layer: layer.top_k for layer in model.layers}
    last = max(top_k)

    def times_at(depth: int) -> list[LayerTimes]:
        found = []
        for work, split in zip(step.works, step.splits, strict=True):
            k = top_k.get(work.layer, 0)
            # which of its experts a token weights least has nothing to do with where they are
            share = min(1.0, depth / k) if k and work.layer != last else 0.0
            found.append(layer_times(work, _deferring(split, share), step.rates))
        return found

    most = deferral_depth(quality, model.top_k)
    return choose_depth(times_at, most, after=output_seconds(model, len(gpus), step.rates))


def _deferring(split: ExpertSplit, share: float) -> ExpertSplit:
    def part(of: float) -> ExpertCount:
        return ExpertCount(split.cpu.experts * of, split.cpu.pairs * of)

    return replace(split, cpu=part(1 - share), deferred=part(share))
