"""What a trace costs is measured with and without one, in turn."""

from __future__ import annotations

import pytest
import trace_cost

from hybrid_moe.cpu_kernels import trace


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a trace is being written in each turn; a warm-up comes first."""
    turns = []

    def seconds(model: object, prompt: object) -> float:
        turns.append(trace.is_recording())
        return 1.02 if trace.is_recording() else 1.0

    monkeypatch.setattr(trace_cost, "seconds_of_a_token", seconds)
    found = trace_cost.measure(0.0, least=4)
    assert turns == [False, True, False, False, True, True, False, False, True]
    assert found.rounds == 4
    assert found.cost == pytest.approx(0.02) and found.error == pytest.approx(0, abs=1e-9)
    assert (found.off_us, found.on_us) == pytest.approx((1e6, 1.02e6))
