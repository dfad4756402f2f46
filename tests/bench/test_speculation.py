"""The gate on the small model's drafts."""

from __future__ import annotations

import pytest
import regret
import speculation
from regret import MACHINES, TEXTS, read_trace
from speculation import new_gate, read_text

from hybrid_moe.schedule.draft_gate import BUDGET, FIRST_STEPS


@pytest.mark.parametrize("name", TEXTS)
def test_drafts_never_lose(name: str) -> None:
    """Whatever the machine: not where every fixed length loses either."""
    trace = read_trace(name)
    for rates in MACHINES.values():
        plain = read_text(trace, new_gate(trace, rates), 0)
        gated = read_text(trace, new_gate(trace, rates))
        spent = FIRST_STEPS / speculation.TOKENS
        assert gated <= plain * (1 + BUDGET + spent) + 1e-9


@pytest.mark.parametrize("name", TEXTS)
def test_more_tokens_meet_more_experts(name: str) -> None:
    trace = regret.read_trace(name)
    counts = [speculation.met(trace, n).experts for n in (1, 2, 3, 5)]
    assert counts[0] == 4 and counts == sorted(counts) and counts[-1] <= trace.num_experts
