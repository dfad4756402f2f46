"""Experts of a Transformers model move while it runs, and its answers stay what they are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.integrations.transformers.hit_rates import hit_rates
from hybrid_moe.integrations.transformers.moving import online_report
from hybrid_moe.placement import online
from hybrid_moe.placement.online import OnlineOptions
from tests.hybrid_moe.tiny_models import build

MODEL = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"
LAYERS, TOP_K = 4, 4
TIE = 0.2
"""Nats. By so much the logits of two BF16 computations of this model may differ, see
tests/sglang/test_server.py."""

NOVEL = (
    "Emma was surprised to see Mr. Knightley in the garden, and could not but wonder whether he "
    "had been waiting there for some time. It is a truth universally acknowledged, that a single "
    "man in possession of a good fortune, must be in want of a wife. "
)
CODE = (
    "def forward(self, x): return [f(x, i) for i in range(len(x))]\nimport os, sys\n"
    "for (k, v) in self._d.items(): print(k, '=', v[0] + 1, end='\\n')\n"
    "if __name__ == '__main__': main(sys.argv[1:])\n"
)


def load(**options: Any) -> Any:
    given = {"gpu_experts": 0.25, "gpu_backend": "torch", "dense": "torch", "progress": False}
    return hybrid_moe.from_pretrained(MODEL, **{**given, **options})


@pytest.fixture(scope="module")
def parts() -> list[torch.Tensor]:
    """Tokens [1, 48] of one topic and then of another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = []
    for text in (NOVEL, CODE):
        ids = tokenizer(text * 10, return_tensors="pt")["input_ids"][0, : 48 * 12]
        made += [part[None] for part in ids.split(48)]
    return made


def logs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits.float().log_softmax(-1)


def differing(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Share of the tokens of which a likely logit is further off than `TIE`. Where the router's
    choice hangs on the last bit, one of four experts is another one: with any other placement too,
    for the halves round apart. A wrong weight would change nearly all tokens."""
    pairs = zip(found, expected, strict=True)
    off = [(((a - b).abs() * (b > -8)).amax(-1) >= TIE).flatten() for a, b in pairs]
    return float(torch.cat(off).float().mean())


@pytest.mark.parametrize("dynamic", [True, pytest.param("4GB,keep", marks=pytest.mark.full)])
def test_experts_move_and_the_model_says_the_same(
    dynamic: Any, parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "LOOK_SECONDS", 0.0)
    static, moving, other = load(), load(dynamic=dynamic), load(gpu_experts=0.75)
    expected = [logs(static, ids) for ids in parts]
    found = [logs(moving, ids) for ids in parts]
    usual = differing([logs(other, ids) for ids in parts], expected)
    assert usual < 0.03
    assert differing(found, expected) <= 2 * usual + 0.01
    report, stays = online_report(moving), hit_rates(static)
    moves = hit_rates(moving)
    assert report is not None and online_report(static) is None
    assert stays is not None and moves is not None
    hot, pairs = (sum(counts) for counts in zip(*moves.layers.values(), strict=True))
    assert pairs == LAYERS * TOP_K * sum(ids.numel() for ids in parts)
    assert report.swaps > 8
    assert hot > 1.2 * sum(hot for hot, _ in stays.layers.values())
    last = parts[-1].numel() * LAYERS * TOP_K  # of the last step, after which nobody has looked
    assert report.pairs == pairs - last and report.hot_pairs <= hot <= report.hot_pairs + last


def test_threads_share_a_model(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be in the middle of a step while another begins one and moves experts."""
    monkeypatch.setattr(online, "LOOK_SECONDS", 0.0)
    parts = parts[::3]
    model = load(dynamic=OnlineOptions(half_life_pairs=4, payback_pairs=0))
    expected = [logs(model, ids) for ids in parts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda ids: logs(model, ids), parts[::-1] * 2))
    assert differing(found, expected[::-1] * 2) < 0.03
    report, moves = online_report(model), hit_rates(model)
    assert report is not None and moves is not None and report.swaps > 8
    assert sum(pairs for _, pairs in moves.layers.values()) == 3 * LAYERS * TOP_K * sum(
        ids.numel() for ids in parts
    )


def test_offload() -> None:
    model = hybrid_moe.offload(
        build("mixtral"), gpu_experts=0.5, gpu_backend="torch", dynamic="keep", progress=False
    )
    report = online_report(model)
    assert report is not None and report.pairs == 0
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
        model(input_ids=torch.tensor([[4]]))
    wrappers = [m.layer.wrapper for m in model.modules() if hasattr(m, "layer")]
    assert wrappers and all(wrapper.keeps_panels for wrapper in wrappers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu_experts": None, "gpu_backend": None}, ValueError, "no expert is to be on a GPU"),
        ({"dynamic": "fast"}, ValueError, "dynamic is 'fast', must be True or False"),
        ({"dynamic": 3}, TypeError, "dynamic is 3"),
    ],
)
def test_refused_before_anything_is_packed(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"gpu_experts": 0.5, "gpu_backend": "torch", "dynamic": True, "progress": False}
    model = build("mixtral")
    with pytest.raises(error, match=message):
        hybrid_moe.offload(model, **{**given, **options})
    assert not any("Hybrid" in type(module).__name__ for module in model.modules())
    with pytest.raises(error, match=message):
        hybrid_moe.from_pretrained(MODEL, **{**given, **options})


def test_nothing_to_move() -> None:
    """All of them hot, or none: no error, no cost."""
    for share in (0.0, 1.0):
        model = load(gpu_experts=share, dynamic=True)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1, 2, 3]]))
        report = online_report(model)
        assert report is not None and report.swaps == 0
