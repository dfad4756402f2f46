"""What the bench of drafts compares: the same answers of one model."""

from __future__ import annotations

import assisted
import pytest


def test_all_kinds_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie of rounding may end it, but not in the first words of this text. Without the gate
    nothing is counted; afterwards the model has its gate again."""
    monkeypatch.setattr(assisted, "TEXTS", {"prose": None})
    monkeypatch.setattr(assisted, "TOKENS", 16)
    found = assisted.measure(1)
    assert {kind for _, kind in found} == set(assisted.KINDS)
    assert len({answer.tokens for answers in found.values() for answer in answers}) == 1
    for (_, kind), (answer,) in found.items():
        if kind == "no drafts":
            assert answer.drafts is None
        else:
            assert answer.drafts is not None
            assert bool(answer.drafts.steps) == kind.endswith("gated")
