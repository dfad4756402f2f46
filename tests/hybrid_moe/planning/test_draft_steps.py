"""How often drafts must be right, how long they should be, and which never pay."""

from __future__ import annotations

import pytest

from hybrid_moe.planning import Model, Plan, make_plan
from hybrid_moe.planning.batch_step import step_seconds
from hybrid_moe.planning.draft_steps import (
    ALGORITHM,
    CHECKED,
    DEPTH,
    LONGEST,
    WIDTH,
    DraftFlags,
    best_depth,
    break_even,
    draft_flags,
    draft_notes,
)
from hybrid_moe.planning.serving import server_command
from tests.hybrid_moe.planning.cases import request

EAGLE = [ALGORITHM, "EAGLE"]


@pytest.fixture(scope="module")
def cold(gpt_oss: Model) -> Plan:
    """Three quarters of the experts on the CPU."""
    return make_plan(gpt_oss, request("14GB", num_gpu_experts=8))


@pytest.fixture(scope="module")
def hot(gpt_oss: Model) -> Plan:
    """All experts on the GPU."""
    return make_plan(gpt_oss, request("48GB"))


def test_a_step_of_one_token_is_what_the_plan_predicts(cold: Plan) -> None:
    assert 1 / step_seconds(cold, 1) == pytest.approx(cold.decode.tokens_per_second)


def test_drafts_pay_from_the_break_even_on(cold: Plan, hot: Plan) -> None:
    """All experts on the GPU: a step reads the rest once however many tokens it has, so that little
    is asked. On the CPU nearly every token more is a token's time more."""

    def chance(plan: Plan, drafted: int) -> float:
        found = break_even(plan, 1 + drafted, drafted)
        assert found is not None
        return found

    for plan in (cold, hot):
        for drafted in (1, 3):
            tokens = sum(chance(plan, drafted) ** n for n in range(drafted + 1))
            slower = step_seconds(plan, 1 + drafted) / step_seconds(plan, 1)
            assert tokens == pytest.approx(slower, rel=1e-3)
        assert chance(plan, 3) > chance(plan, 1) > 0
    assert chance(cold, 1) > chance(hot, 1)


def test_trees_that_never_pay(cold: Plan, hot: Plan) -> None:
    """Of 64 tokens that a step checks, one path of 2 is taken: 3 tokens at most, for which a step
    takes much longer with experts on the CPU. Every shape is tried."""
    for plan in (cold, hot):
        for checked in (2, 8, 64):
            for longest in (1, 2, 5):
                slower = step_seconds(plan, checked) / step_seconds(plan, 1)
                assert (break_even(plan, checked, longest) is None) == (slower > 1 + longest)
    assert break_even(cold, 64, 2) is None
    words = [*EAGLE, DEPTH, "2", WIDTH, "8", CHECKED, "64"]
    (note,) = draft_notes(cold, words)
    assert "adds 3 tokens at most: these drafts never pay" in note
    assert draft_flags(cold, words) == []


@pytest.mark.parametrize("chance", [0.3, 0.7, 0.95])
def test_the_best_length(cold: Plan, hot: Plan, chance: float) -> None:
    """Against simulated steps: a token is right with this chance, or what follows it is lost."""
    for plan in (cold, hot):
        speeds = {}
        for drafted in range(1, LONGEST + 1):
            ends = [chance**n * (1 - chance) for n in range(drafted)] + [chance**drafted]
            tokens = sum(probability * (1 + right) for right, probability in enumerate(ends))
            speeds[drafted] = tokens / step_seconds(plan, 1 + drafted)
        assert speeds[best_depth(plan, chance)] == pytest.approx(max(speeds.values()))
    assert best_depth(hot, chance) >= best_depth(cold, chance)


def test_the_note(cold: Plan) -> None:
    (note,) = draft_notes(cold, [*EAGLE, CHECKED, "4"])
    assert note.startswith("a step of 4 tokens meets more experts")
    assert f"drafts pay if they are right {break_even(cold, 4, 3):.0%} of the time" in note
    assert draft_notes(cold, [f"{CHECKED}=4"]) == [note]
    for words in ([], [CHECKED], [CHECKED, "1"], [CHECKED, "many"], ["--other", "4"]):
        assert draft_notes(cold, words) == []


def test_lengths_are_set_where_the_user_says_none(cold: Plan, hot: Plan) -> None:
    for plan in (cold, hot):
        depth = best_depth(plan)
        chosen = [DEPTH, str(depth), WIDTH, "1", CHECKED, str(depth + 1)]
        assert draft_flags(plan, EAGLE) == draft_flags(plan, [f"{ALGORITHM}=nextn"]) == chosen
        first, second = draft_notes(plan, EAGLE)
        assert first.startswith(f"drafts of {depth} tokens are the best if 70% of them are right")
        assert second.startswith(f"a step of {depth + 1} tokens")
    # SGLang takes all three or none, and other algorithms have lengths of their own
    for words in (
        [],
        [ALGORITHM, "NGRAM"],
        *([*EAGLE, flag, "4"] for flag in (DEPTH, WIDTH, CHECKED)),
    ):
        assert draft_flags(cold, words) == []
    assert DraftFlags.of([*EAGLE, CHECKED, "4", CHECKED, "6"]).checked == 6
    words = list(server_command(cold, extra=EAGLE).arguments)
    assert words[words.index(DEPTH) + 1] == str(best_depth(cold)) and words[-2:] == EAGLE
