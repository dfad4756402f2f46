"""The scheduler's decisions on recorded routing."""

from __future__ import annotations

import pytest
import regret


@pytest.mark.parametrize("name", regret.TEXTS)
def test_traces_are_what_they_say(name: str) -> None:
    trace = regret.read_trace(name)
    assert trace.ids.shape == (regret.TOKENS, 4, 4) == trace.weights.shape
    assert trace.ids.min() >= 0 and trace.ids.max() < trace.num_experts == 16
    assert trace.weights.sum(2) == pytest.approx(1, abs=0.01)
    assert trace.hot(0.25).sum(1).tolist() == [4] * 4
    demands = next(trace.steps(4, trace.hot(0.25), 0))
    assert len(demands) == 4
    assert all(d.tokens.sum() + d.hot.pairs == 4 * 4 for d in demands)


@pytest.mark.parametrize("machine", regret.MACHINES)
def test_decisions_are_near_the_best(machine: str) -> None:
    """Within 5 % of the optimum that knows all routing; never worse than all on the CPU."""
    for batch, depth, most in ((1, 0, 16), (1, 2, 64), (4, 2, 32)):
        for name in regret.TEXTS:
            trace, rates = regret.read_trace(name), regret.MACHINES[machine]
            found, cpu = regret.regret(
                trace, trace.hot(0.25), rates, batch=batch, max_deferred=depth, most=most
            )
            assert -1e-9 <= found <= 0.05
            assert found <= cpu + 1e-9
