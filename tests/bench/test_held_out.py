"""What was chosen on some texts holds on others: placements, online placement, the scheduler."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from held_out import DECIDED, HOT, PROFILES, TOKENS, TOPICS, decided, placements, read_topic
from online_placement import TRACE, after_change
from regret import MACHINES, TEXTS, read_trace, regret

from hybrid_moe.placement.routing_profile_file import read_routing_profile

DOCUMENTED = {
    "persuasion": {"uniform": 24.6, "frequency": 32.4, "cost": 32.4},
    "tom_sawyer": {"uniform": 25.6, "frequency": 33.0, "cost": 33.0},
    "python_code": {"uniform": 25.3, "frequency": 53.1, "cost": 53.1},
}
"""docs/placement.md: percent of the pairs of the second half."""


def test_there_are_three_kinds_of_text() -> None:
    assert {file.stem for file in PROFILES} == DOCUMENTED.keys()


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_cost_hits_at_least_as_often_as_frequency(file: Path) -> None:
    found = placements(read_routing_profile(file))
    rates = {name: rate for name, (_, rate) in found.items()}
    assert rates["cost"] >= rates["frequency"] >= rates["uniform"]
    shown = {name: pytest.approx(100 * rate, abs=0.06) for name, rate in rates.items()}
    assert DOCUMENTED[file.stem] == shown
    assert {int(mask.sum()) for mask, _ in found.values()} == {found["cost"][0].size // 4}


def test_held_out_traces_are_of_other_tokens() -> None:
    """No 16 tokens in a row were routed as in a trace on which something was chosen."""

    def runs(ids: np.ndarray) -> set[bytes]:
        sets = np.sort(ids.astype(np.uint8), axis=2)
        return {sets[at : at + 16].tobytes() for at in range(len(sets) - 15)}

    with np.load(TRACE) as stored:
        known = set().union(*(runs(stored[name]) for name in stored.files))
    known |= set().union(*(runs(read_trace(name).ids) for name in TEXTS))
    for name in TOPICS:
        trace = read_topic(name)
        assert trace.ids.shape == (TOKENS, 4, 4) and trace.num_experts == 4 * HOT
        assert not runs(trace.ids) & known
        end, _ = decided(name)
        assert len(end.ids) == DECIDED
        assert end.weights.sum(2) == pytest.approx(1, abs=0.01)


CHANGES = [
    pytest.param(*pair, marks=() if abs(at % 4 - at // 3) == 2 else pytest.mark.full)
    for at, pair in enumerate(itertools.permutations(TOPICS, 2))
]


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_online_is_near_the_optimum_500_tokens_after_a_change(one: str, other: str) -> None:
    """Within 5 % of the best that does not move and knows what comes."""
    change = after_change(read_topic(one).ids, read_topic(other).ids, HOT)
    assert change.online >= 0.95 * change.optimum
    assert change.online > change.stays


HARDEST = ("2 channels, PCIe 5", 1, 2, 64)
"""Where sending and deferring are both worth while: some steps of one token."""

EVERY = [
    pytest.param(*case, None, marks=pytest.mark.full)
    for case in itertools.product(MACHINES, (1, 4), (0, 2))
]


@pytest.mark.parametrize(("machine", "batch", "deferred", "most"), [HARDEST, *EVERY])
def test_decisions_are_near_the_best(
    machine: str, batch: int, deferred: int, most: int | None
) -> None:
    """Within 5 % of the optimum that knows all routing."""
    rates = MACHINES[machine]
    for name in TOPICS:
        trace, hot = decided(name)
        found, cpu = regret(trace, hot, rates, batch=batch, max_deferred=deferred, most=most)
        assert -1e-9 <= found <= 0.05
        assert found <= cpu + 1e-9
