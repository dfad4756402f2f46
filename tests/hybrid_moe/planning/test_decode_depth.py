"""How many experts of a token `serve` defers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid_moe.planning import Model, make_plan
from hybrid_moe.planning.decode_depth import decode_depth
from hybrid_moe.schedule.quality import BALANCED, EXACT
from tests.hybrid_moe.planning.cases import CPU, request


def test_no_more_than_quality_allows_and_no_more_than_helps(gpt_oss: Model) -> None:
    """Four experts of a token, of which balanced may defer one."""
    plan = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    exact, balanced = decode_depth(plan, EXACT), decode_depth(plan, BALANCED)
    assert (exact.depth, exact.speedup) == (0, 1)
    assert balanced.depth == 1 and 1.01 < balanced.speedup < 4 / 3
    assert balanced.seconds[0] == pytest.approx(1 / plan.decode.tokens_per_second)
    # nothing is left to defer, or attention takes no time beside the experts
    all_hot = make_plan(gpt_oss, request("48GB"))
    assert decode_depth(all_hot, BALANCED).depth == 0
    slow = make_plan(gpt_oss, request("14GB", num_gpu_experts=8, cpu=replace(CPU, read=1e9)))
    assert decode_depth(slow, BALANCED).depth == 0
