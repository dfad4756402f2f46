"""How often drafts must be right."""

from __future__ import annotations

import pytest

from hybrid_moe.planning import Model, make_plan
from hybrid_moe.planning.draft_steps import FLAG, break_even, draft_notes, step_seconds
from tests.hybrid_moe.planning.cases import request


def test_a_step_of_one_token_is_what_the_plan_predicts(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    assert 1 / step_seconds(plan, 1) == pytest.approx(plan.decode.tokens_per_second)


def test_drafts_pay_from_the_break_even_on(gpt_oss: Model) -> None:
    """All experts on the GPU: a step reads the rest once however many tokens it has, so that little
    is asked. On the CPU nearly every token more is a token's time more."""
    cold = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    hot = make_plan(gpt_oss, request("48GB"))
    for plan in (cold, hot):
        for drafted in (1, 3):
            chance = break_even(plan, drafted)
            tokens = sum(chance**n for n in range(drafted + 1))
            slower = step_seconds(plan, 1 + drafted) / step_seconds(plan, 1)
            assert tokens == pytest.approx(slower, rel=1e-3)
        assert break_even(plan, 3) > break_even(plan, 1) > 0
    assert break_even(cold, 1) > break_even(hot, 1)


def test_the_note(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    (note,) = draft_notes(plan, ["--speculative-algorithm", "EAGLE", FLAG, "4"])
    assert note.startswith("a step of 4 tokens meets more experts")
    assert f"drafts pay if they are right {break_even(plan, 3):.0%} of the time" in note
    assert draft_notes(plan, [f"{FLAG}=4"]) == [note]
    for words in ([], [FLAG], [FLAG, "1"], [FLAG, "many"], ["--other", "4"]):
        assert draft_notes(plan, words) == []
