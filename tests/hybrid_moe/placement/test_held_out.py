"""The small model's real routing: placements made from the first half of a text, measured on the
second half, which they have not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hybrid_moe.placement.balanced_packing import rebalance_experts
from hybrid_moe.placement.cost_placement import place_by_cost
from hybrid_moe.placement.routed_costs import expected_use, layer_cost
from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.placement.routing_profile_file import read_routing_profile
from hybrid_moe.placement.strategies import place_experts
from hybrid_moe.schedule.layer_work import ExpertWork, GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates
from tests.hybrid_moe.placement.test_balanced_packing import published_layer

ROOT = Path(__file__).parents[3]
PROFILES = sorted((ROOT / "examples" / "tiny_moe" / "profiles").glob("*.json"))

EXPERT = ExpertWork(13.2e6, 13.2e6, 24.9e6, one_token_rate=4e11, many_tokens_rate=5e11)
"""The small model's experts are 53 KB, which no GPU is bought for: these are gpt-oss's."""

RATES = MachineRates(56e9, 700e9, 28e12, submit=50e-6, back=50e-6)

DOCUMENTED = {
    "persuasion": {"uniform": 24.6, "frequency": 32.4, "cost": 32.4},
    "tom_sawyer": {"uniform": 25.6, "frequency": 33.0, "cost": 33.0},
    "python_code": {"uniform": 25.3, "frequency": 53.1, "cost": 53.1},
}
"""docs/placement.md: percent of the pairs of the second half."""

Mask = npt.NDArray[np.bool_]


def halves(profile: RoutingProfile) -> tuple[RoutingProfile, npt.NDArray[np.int64]]:
    """A profile of the first half of the time, and the counts [L, E] of the second."""
    middle = len(profile.windows) // 2
    assert middle >= 2
    counts = np.zeros((3, *profile.shape), np.int64)
    counts[2] = profile.windows[:middle].sum(0)
    tokens = np.array([0, 0, profile.window_tokens[:middle].sum()])
    return RoutingProfile(profile.model, counts, tokens), profile.windows[middle:].sum(0)


def hot_by_cost(profile: RoutingProfile, experts: int) -> Mask:
    costs = [
        layer_cost(LayerWork(layer, GpuAmount(), expert=EXPERT), use, 1, RATES)
        for layer, use in zip(profile.model.layers, expected_use(profile), strict=True)
    ]
    masks = place_by_cost(costs, experts).masks
    return np.stack([masks[layer] for layer in profile.model.layers])


def test_there_are_three_kinds_of_text() -> None:
    assert {file.stem for file in PROFILES} == DOCUMENTED.keys()


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_cost_hits_at_least_as_often_as_frequency(file: Path) -> None:
    seen, unseen = halves(read_routing_profile(file))
    L, E = seen.shape
    experts = L * E // 4
    found = {
        "cost": hot_by_cost(seen, experts),
        "frequency": place_experts("frequency", L, E, experts, activation_freq=seen.counts).numpy(),
        "uniform": place_experts("uniform", L, E, experts).numpy(),
    }
    rates = {name: float(unseen[mask].sum() / unseen.sum()) for name, mask in found.items()}
    assert rates["cost"] >= rates["frequency"] >= rates["uniform"]
    shown = {name: pytest.approx(100 * rate, abs=0.06) for name, rate in rates.items()}
    assert DOCUMENTED[file.stem] == shown
    assert {int(mask.sum()) for mask in found.values()} == {experts}


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
@pytest.mark.parametrize(("replicas", "groups", "nodes"), [(20, 1, 1), (24, 4, 2), (16, 4, 2)])
def test_packing_is_never_worse_than_the_published_rule(
    file: Path, replicas: int, groups: int, nodes: int
) -> None:
    profile = read_routing_profile(file)
    counts = profile.counts.astype(float)
    placed = rebalance_experts(counts, replicas, groups, nodes, 4, profile.pairs)
    fullest = placed.gpu_loads(counts).max(1)
    for layer, row in enumerate(counts):
        theirs = published_layer(row, replicas, groups, nodes, 4)[1]
        assert fullest[layer] <= theirs * (1 + 1e-9)
