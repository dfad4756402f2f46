"""Answers one after the other: what is kept in between, and what ends them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.transformers.registration import offload
from hybrid_moe.integrations.transformers.serving.answers import (
    LEAST_REUSED,
    Answerer,
    CancelledError,
)
from tests.hybrid_moe.tiny_models import build, greedy


@pytest.fixture(scope="module")
def qwen() -> Any:
    return offload(build("qwen3_moe"), "BF16", threads=1, progress=False)


@pytest.fixture(scope="module")
def gpt_oss() -> Any:
    """Its windows are 16 tokens, fewer than are ever reused."""
    return offload(build("gpt_oss"), "BF16", threads=1, progress=False)


def config(model: Any, tokens: int, **changes: Any) -> Any:
    made = copy.deepcopy(model.generation_config)
    made.update(max_new_tokens=tokens, do_sample=False, pad_token_id=0, **changes)
    return made


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(2, 120, (length,), generator=rng).tolist()


def follows(model: Any, ids: list[int], tokens: Any) -> bool:
    """Whether each token is the likeliest behind those before it, in one pass that keeps nothing;
    or as good as that: a prompt is cut in another place then, and attention of many tokens rounds
    unlike that of few. Five roundings of BF16, as in `tiny_models.SEEDS`."""
    whole = torch.tensor([[*ids, *tokens]])
    with torch.no_grad():
        scores = model(input_ids=whole).logits[0, len(ids) - 1 : -1].float()
    chosen = scores.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
    return bool((scores.max(1).values - chosen <= 0.019 * scores.abs().max()).all())


def reads(model: Any) -> tuple[list[int], Any]:
    """The lengths of what the model reads from now on, and what ends that."""
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    return lengths, model.register_forward_pre_hook(note, with_kwargs=True)


def test_the_tokens_are_transformers_own(qwen: Any) -> None:
    ids = prompt(9)
    seen: list[int] = []
    answer = Answerer(qwen).answer(ids, config(qwen, 12), seen.append)  # type: ignore[arg-type]
    assert list(answer.tokens) == seen == greedy(qwen, torch.tensor([ids]), 12)
    assert (answer.prompt, answer.reused, answer.end) == (9, 0, "length")
    assert len(answer.times) == 12 and sorted(answer.times) == list(answer.times)
    assert answer.prefill_speed > 0 and answer.decode_speed is not None


@pytest.mark.parametrize("family", ["qwen", "gpt_oss"])
def test_a_conversation_is_not_read_again(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    answerer, ids = Answerer(model), prompt(LEAST_REUSED)
    first = answerer.answer(ids, config(model, 6))
    longer = [*ids, *first.tokens, *prompt(5, seed=1)]
    lengths, hook = reads(model)
    with hook:
        second = answerer.answer(longer, config(model, 4))
    assert second.reused == len(ids) + 5  # the last token was not read by the model yet
    assert lengths == [6, 1, 1, 1]
    assert follows(model, longer, second.tokens)


def test_the_common_beginning_is_kept_where_the_cache_can_be_cut(qwen: Any, gpt_oss: Any) -> None:
    for model, kept in ((qwen, 40), (gpt_oss, 0)):
        answerer, ids = Answerer(model), prompt(60)
        answerer.answer(ids, config(model, 3))
        other = [*ids[:40], *prompt(7, seed=2)]
        answer = answerer.answer(other, config(model, 6))
        assert answer.reused == kept
        assert follows(model, other, answer.tokens)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_an_answer_is_cut_off_again(qwen: Any, gpt_oss: Any, cut: int) -> None:
    """As thoughts leave a conversation: windows, 16 tokens here, are as they were."""
    for model in (qwen, gpt_oss):
        answerer, ids = Answerer(model), prompt(LEAST_REUSED + 5)
        first = answerer.answer(ids, config(model, 31))
        for turn in range(2):
            other = [*ids, *first.tokens[: 30 - cut], *prompt(6, seed=5 + turn)]
            answer = answerer.answer(other, config(model, 6))
            assert answer.reused == len(ids) + 30 - cut
            assert follows(model, other, answer.tokens)


def test_the_same_prompt_again_reads_its_last_token(qwen: Any) -> None:
    answerer, ids = Answerer(qwen), prompt(50)
    first = answerer.answer(ids, config(qwen, 5))
    again = answerer.answer(ids, config(qwen, 5))
    assert again.reused == 49 and again.tokens == first.tokens
    answerer.forget()
    assert answerer.answer(ids, config(qwen, 5)).reused == 0


def test_a_short_beginning_is_read_again(qwen: Any) -> None:
    """So that an answer does not depend on those before it."""
    answerer, ids = Answerer(qwen), prompt(60)
    answerer.answer(ids, config(qwen, 2))
    other = [*ids[: LEAST_REUSED - 1], *prompt(9, seed=3)]
    assert answerer.answer(other, config(qwen, 2)).reused == 0


def test_what_ends_an_answer(qwen: Any) -> None:
    ids = prompt(9)
    answerer, whole = Answerer(qwen), greedy(qwen, torch.tensor([ids]), 8)
    end = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 1)
    model_ends = answerer.answer(ids, config(qwen, 8, eos_token_id=whole[end]))
    assert (list(model_ends.tokens), model_ends.end) == (whole[: end + 1], "stop")
    last = answerer.answer(ids, config(qwen, end + 1, eos_token_id=whole[end]))
    assert (len(last.tokens), last.end) == (end + 1, "stop")
    caller_ends = answerer.answer(ids, config(qwen, 8), lambda token: token == whole[end])
    assert (caller_ends.tokens, caller_ends.end) == (model_ends.tokens, "stop")
    cancelled = threading.Event()

    def cancel(token: int) -> None:
        if token == whole[end]:
            cancelled.set()

    given_up = answerer.answer(ids, config(qwen, 8), cancel, cancelled)
    assert (given_up.tokens, given_up.end) == (model_ends.tokens, "cancelled")
    one = answerer.answer(ids, config(qwen, 1))
    assert one.decode_speed is None and one.end == "length"


def test_an_answer_is_cancelled_within_the_prefill(qwen: Any) -> None:
    """Between two layers; the next answer is as if nothing had been."""
    answerer, ids, cancelled = Answerer(qwen), prompt(50), threading.Event()
    before = answerer.answer(ids, config(qwen, 4))
    longer, tokens = [*ids, *prompt(20, seed=4)], []
    layers = [m for m in qwen.modules() if type(m).__name__ == "HybridExperts"]
    passed: list[int] = []
    hooks = [
        layers[0].register_forward_hook(lambda *_: cancelled.set()),
        layers[1].register_forward_hook(lambda *_: passed.append(1)),
    ]
    with pytest.raises(CancelledError):
        answerer.answer(longer, config(qwen, 4), tokens.append, cancelled)
    for hook in hooks:
        hook.remove()
    assert passed == [] and tokens == []
    again = answerer.answer(ids, config(qwen, 4))
    assert (again.tokens, again.reused) == (before.tokens, 0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (qwen, *layers))


def test_what_is_cancelled_while_it_waits_costs_nothing(qwen: Any) -> None:
    answerer, ids, cancelled = Answerer(qwen), prompt(50), threading.Event()
    answerer.answer(ids, config(qwen, 4))
    cancelled.set()
    lengths, hook = reads(qwen)
    with hook, pytest.raises(CancelledError):
        answerer.answer(prompt(60, seed=9), config(qwen, 4), cancelled=cancelled)
    assert lengths == []
    assert answerer.answer(ids, config(qwen, 4)).reused == 49  # the cache is still there


def test_an_error_leaves_nothing_behind(qwen: Any) -> None:
    answerer, ids = Answerer(qwen), prompt(50)
    before = answerer.answer(ids, config(qwen, 4))

    def fail(token: int) -> None:
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        answerer.answer(ids, config(qwen, 4), fail)
    assert answerer.answer(ids, config(qwen, 4)).tokens == before.tokens
