"""What speculative decoding asks of its drafts on a machine: how often they must be right to pay.

With experts on the CPU a step of several tokens meets more experts and takes longer. The draft's
own time is not counted: it is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_moe.planning.plan import Plan
from hybrid_moe.planning.prediction import output_seconds, step_of
from hybrid_moe.schedule.timeline import run_step

FLAG = "--speculative-num-draft-tokens"
"""SGLang's: tokens that a step checks, the one that is certain included."""


def step_seconds(plan: Plan, tokens: int) -> float:
    """Of a step with so many tokens of one request, the context half full. The plan has a GPU."""
    gpus = plan.request.gpus
    held = plan.cache.per_gpu(len(gpus)) / 2
    step = step_of(plan.model, plan.hot, plan.request.cpu, gpus, tokens, held)
    after = output_seconds(plan.model, len(gpus), step.rates)
    return run_step(step.times(), after=after).seconds


def break_even(plan: Plan, drafted: int) -> float:
    """How often a drafted token must be right, those before it being right, so that steps with so
    many pay. At most always: n tokens meet no more experts together than one by one."""
    slower = step_seconds(plan, 1 + drafted) / step_seconds(plan, 1)
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        tokens = sum(middle**n for n in range(drafted + 1))
        low, high = (low, middle) if tokens >= slower else (middle, high)
    return high


def draft_notes(plan: Plan, extra: Sequence[str]) -> list[str]:
    """A note where flags for SGLang ask for drafts, and say how long."""
    words = [part for word in extra for part in word.split("=", 1)]
    places = [n for n, word in enumerate(words[:-1]) if word == FLAG]
    if not places or not words[places[-1] + 1].isdecimal():
        return []
    checked = int(words[places[-1] + 1])
    if checked < 2:
        return []
    needed = break_even(plan, checked - 1)
    slower = step_seconds(plan, checked) / step_seconds(plan, 1)
    return [
        f"a step of {checked} tokens meets more experts and takes {slower:.1f} x as long as one of "
        f"1: drafts pay if they are right {needed:.0%} of the time"
    ]
