"""`HYBRID_MOE_QUALITY=balanced` in Transformers: a quarter of a token's experts one layer later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.transformers.split_experts import SplitExperts
from hybrid_moe.runtime.deferral import split_deferred
from hybrid_moe.schedule.quality import VARIABLE
from tests.hybrid_moe.integrations.loading_cases import hybrid_experts
from tests.hybrid_moe.integrations.test_moving import LAYERS, TOP_K, differing, load, logs

EXPERTS = 16
PROMPTS = [torch.randint(0, 900, (1, tokens), generator=torch.Generator().manual_seed(tokens))
           for tokens in (1, 2, 7, 1, 24)]  # fmt: skip


@pytest.fixture
def balanced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The small model, a quarter of its experts hot."""
    monkeypatch.setenv(VARIABLE, "balanced")
    return load()


def split_layers(model: Any) -> list[SplitExperts]:
    return [module.layer for module in hybrid_experts(model)]  # type: ignore[misc]


def defer_by_hand(model: Any) -> None:
    """Let a model whose layers compute what they are asked for defer one of a token's experts."""
    carried: list[torch.Tensor] = []

    def forward(run: Any, is_last: bool, hidden: Any, ids: Any, weights: Any) -> torch.Tensor:
        later = torch.full_like(ids, -1)
        if not is_last:
            ids, later = split_deferred(ids, weights, TOP_K - 1, EXPERTS)
        y: torch.Tensor = run(hidden, ids, weights).float()
        y = y + carried.pop().float() if carried else y
        if not is_last:
            carried.append(run(hidden, later, weights))
        return y.to(hidden.dtype)

    modules = list(hybrid_experts(model))
    for at, module in enumerate(modules):
        run, is_last = module.forward, at == len(modules) - 1
        module.forward = (  # type: ignore[method-assign]
            lambda *given, run=run, is_last=is_last: forward(run, is_last, *given)
        )


def test_what_is_deferred_is_added_one_layer_later(
    balanced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    exact, by_hand = load(), load()
    for model, depth in ((balanced, TOP_K // 4), (exact, 0)):
        found = [w.wrapper.max_deferred_experts_per_token for w in split_layers(model)]
        assert found == [depth] * LAYERS
    defer_by_hand(by_hand)
    found, expected, without = (
        [logs(model, ids) for ids in PROMPTS] for model in (balanced, by_hand, exact)
    )
    assert differing(found, expected) < 0.03 < differing(found, without)


def test_threads_defer_to_themselves(balanced: Any) -> None:
    """Each may be between two layers while another one is at any."""
    expected = [logs(balanced, ids) for ids in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda ids: logs(balanced, ids), PROMPTS * 4))
    assert all(torch.equal(*pair) for pair in zip(found, expected * 4, strict=True))


def test_a_step_that_was_given_up_leaves_nothing(balanced: Any) -> None:
    expected = [logs(balanced, ids) for ids in PROMPTS]
    for module in list(hybrid_experts(balanced))[1:3]:

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = module.register_forward_pre_hook(fail)
        for ids, before in zip(PROMPTS, expected, strict=True):
            with pytest.raises(KeyboardInterrupt):
                logs(balanced, PROMPTS[2])
            hook.remove()
            assert torch.equal(logs(balanced, ids), before)
            hook = module.register_forward_pre_hook(fail)
        hook.remove()


def test_an_unknown_quality_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "best")
    with pytest.raises(ValueError, match="HYBRID_MOE_QUALITY=best: must be exact or balanced"):
        load()
