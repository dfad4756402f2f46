"""How long a plan's steps of several tokens take, of one request or of several."""

from __future__ import annotations

from hybrid_moe.planning.plan import Plan
from hybrid_moe.planning.prediction import output_seconds, step_of
from hybrid_moe.schedule.timeline import run_step


def step_seconds(plan: Plan, tokens: int) -> float:
    """Of a step with so many tokens, the cache, which all requests share, half full. The plan has a
    GPU."""
    gpus = plan.request.gpus
    held = plan.cache.per_gpu(len(gpus)) / 2
    step = step_of(plan.model, plan.hot, plan.request.cpu, gpus, tokens, held)
    after = output_seconds(plan.model, len(gpus), step.rates)
    return run_step(step.times(), after=after).seconds
