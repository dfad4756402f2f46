"""Packing of replicas: held against DeepSeek's algorithm, written out once more from its
description, and against every packing there is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement.balanced_packing import (
    ReplicaPlacement,
    divide_experts,
    rebalance_experts,
)
from hybrid_moe.placement.routing_profile_file import read_routing_profile

F64 = npt.NDArray[np.float64]

EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)
"""Loads of the README of EPLB: 16 replicas in 4 groups, 2 nodes, 8 GPUs."""

PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
"""What it prints for them."""


def published_layer(
    loads: F64, replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[list[int], float]:
    """DeepSeek's heuristic as its README describes it, for one layer: experts of the replicas, GPU
    after GPU, and the load of the fullest GPU."""
    if groups % nodes:
        groups = nodes = 1

    def pack(weights: list[float], packs: int) -> list[list[int]]:
        items: list[list[int]] = [[] for _ in range(packs)]
        for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
            free = [p for p in items if len(p) < len(weights) // packs]
            min(free, key=lambda p: sum(weights[i] for i in p)).append(item)
        return items

    size = len(loads) // groups
    of_node = pack([float(loads[g * size : (g + 1) * size].sum()) for g in range(groups)], nodes)
    experts, fullest = [], 0.0
    for chosen in of_node:
        ids = [g * size + i for g in chosen for i in range(size)]
        count = dict.fromkeys(ids, 1)
        copies = list(ids)
        while len(copies) < replicas // nodes:
            most = max(ids, key=lambda e: loads[e] / count[e])
            count[most] += 1
            copies.append(most)
        for gpu in pack([loads[e] / count[e] for e in copies], gpus // nodes):
            experts += [copies[i] for i in gpu]
            fullest = max(fullest, sum(loads[copies[i]] / count[copies[i]] for i in gpu))
    return experts, fullest


def check(placed: ReplicaPlacement, loads: F64, replicas: int, gpus: int) -> F64:
    """It is a placement; loads of the GPUs [L, G], added up by hand."""
    L, E = loads.shape
    assert placed.physical_to_logical.shape == (L, replicas)
    found = np.zeros((L, gpus))
    for layer, row in enumerate(placed.physical_to_logical):
        assert set(row) == set(range(E))
        for expert in range(E):
            places = [i for i in placed.logical_to_physical[layer, expert] if i >= 0]
            assert places == [i for i in range(replicas) if row[i] == expert]
            assert placed.counts[layer, expert] == len(places)
            for place in places:
                found[layer, place * gpus // replicas] += loads[layer, expert] / len(places)
    np.testing.assert_allclose(placed.gpu_loads(loads), found)
    return found


def test_the_published_example() -> None:
    placed = rebalance_experts(EXAMPLE, 16, 4, 2, 8)
    loads = check(placed, EXAMPLE, 16, 8)
    for layer in range(2):
        experts, fullest = published_layer(EXAMPLE[layer], 16, 4, 2, 8)
        by_gpu = np.sort(np.reshape(experts, (8, 2)))
        printed = np.sort(np.reshape(PUBLISHED[layer], (8, 2)))
        assert sorted(map(tuple, by_gpu)) == sorted(map(tuple, printed))  # the rule is theirs
        assert loads[layer].max() <= fullest * (1 + 1e-9)
        for node in range(2):  # groups of three stay whole on a node
            own = set(placed.physical_to_logical[layer, node * 8 : node * 8 + 8])
            assert {e // 3 for e in own} == {g for g in range(4) if 3 * g in own}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(
        [(8, 8, 4, 2, 4), (8, 12, 4, 2, 4), (12, 16, 3, 2, 4), (16, 24, 8, 2, 8), (32, 48, 1, 1, 8)]
    ),
    st.floats(0.1, 3),
)
def test_never_worse_than_the_published_rule(
    seed: int, case: tuple[int, int, int, int, int], skew: float
) -> None:
    E, replicas, groups, nodes, gpus = case
    loads = np.random.default_rng(seed).gamma(skew, 100, (2, E)).round(1)
    placed = rebalance_experts(loads, replicas, groups, nodes, gpus)
    fullest = check(placed, loads, replicas, gpus).max(1)
    for layer in range(2):
        theirs = published_layer(loads[layer], replicas, groups, nodes, gpus)[1]
        assert fullest[layer] <= theirs * (1 + 1e-9)
        assert fullest[layer] >= loads[layer].sum() / gpus * (1 - 1e-9)


PROFILES = sorted((Path(__file__).parents[3] / "examples" / "tiny_moe" / "profiles").glob("*.json"))


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
@pytest.mark.parametrize(("replicas", "groups", "nodes"), [(20, 1, 1), (24, 4, 2), (16, 4, 2)])
def test_never_worse_than_the_published_rule_on_measured_routing(
    file: Path, replicas: int, groups: int, nodes: int
) -> None:
    profile = read_routing_profile(file)
    counts = profile.counts.astype(float)
    placed = rebalance_experts(counts, replicas, groups, nodes, 4, profile.pairs)
    fullest = placed.gpu_loads(counts).max(1)
    for layer, row in enumerate(counts):
        theirs = published_layer(row, replicas, groups, nodes, 4)[1]
        assert fullest[layer] <= theirs * (1 + 1e-9)


@pytest.mark.parametrize(
    ("case", "theirs", "ours"),
    [
        ((256, 288, 1, 1, 32), 1.0035, 1.0003),
        ((256, 288, 8, 4, 32), 1.0455, 1.0413),
        ((64, 80, 8, 2, 8), 1.0300, 1.0118),
    ],
)
def test_the_table_of_the_documents(
    case: tuple[int, int, int, int, int], theirs: float, ours: float
) -> None:
    """docs/placement.md: the fullest GPU over the mean."""
    loads = np.random.default_rng(0).gamma(0.8, 100, (10, case[0]))
    mean = loads.sum(1) / case[4]
    published = np.array([published_layer(row, *case[1:])[1] for row in loads])
    found = rebalance_experts(loads, *case[1:])
    assert (published / mean).mean() == pytest.approx(theirs, abs=6e-5)
    assert found.imbalance(loads).mean() == pytest.approx(ours, abs=6e-5)


def best_packing(loads: F64, replicas: int, gpus: int) -> float:
    """The lightest fullest GPU over all replicas and packings."""
    E, best = len(loads), np.inf
    for more in itertools.combinations_with_replacement(range(E), replicas - E):
        copies = [*range(E), *more]
        share = [loads[e] / copies.count(e) for e in copies]
        best = min(best, _packed(share, list(range(replicas)), replicas // gpus))
    return best


def _packed(share: list[float], left: list[int], size: int) -> float:
    if not left:
        return 0.0
    first, rest = left[0], left[1:]
    return min(
        max(
            share[first] + sum(share[i] for i in others),
            _packed(share, [i for i in rest if i not in others], size),
        )
        for others in itertools.combinations(rest, size - 1)
    )


def test_near_the_best_of_all_packings() -> None:
    """Not proven for each: exchanges can end in a place that no exchange leaves."""
    random = np.random.default_rng(5)
    ratios = []
    for _ in range(12):
        loads = random.gamma(0.7, 100, 6)
        placed = rebalance_experts(loads[None], 8, 1, 1, 4)
        ratios.append(placed.gpu_loads(loads[None]).max() / best_packing(loads, 8, 4))
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) <= 1.01


def within_gpus(placed: ReplicaPlacement, together: F64) -> float:
    """Pairs of experts that a token uses together on one GPU, replicas taken at random."""
    total = 0.0
    for gpu in placed.physical_to_logical[0].reshape(placed.num_gpus, -1):
        for a, b in itertools.combinations(gpu, 2):
            total += together[a, b] / placed.counts[0, a] / placed.counts[0, b]
    return total


def test_experts_of_one_token_are_kept_apart() -> None:
    """Experts i and i + 4 often work together, and all are equally busy."""
    together = np.zeros((16, 16))
    for i in (0, 1, 2, 3, 8, 9, 10, 11):
        together[i, i + 4] = together[i + 4, i] = 100
    loads = np.full((1, 16), 100.0)
    blind = rebalance_experts(loads, 16, 1, 1, 4)
    aware = rebalance_experts(loads, 16, 1, 1, 4, together[None])
    assert check(aware, loads, 16, 4).max() == check(blind, loads, 16, 4).max() == 400
    assert within_gpus(blind, together) > 0
    assert within_gpus(aware, together) == 0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_keeping_apart_costs_no_balance(seed: int) -> None:
    random = np.random.default_rng(seed)
    loads = random.gamma(1, 100, (1, 24))
    together = random.gamma(0.3, 10, (24, 24))
    together = together + together.T
    blind = rebalance_experts(loads, 32, 1, 1, 8)
    aware = rebalance_experts(loads, 32, 1, 1, 8, together[None])
    assert aware.gpu_loads(loads).max() <= blind.gpu_loads(loads).max() * (1 + 1e-9)
    np.fill_diagonal(together, loads[0])
    assert within_gpus(aware, together) <= within_gpus(blind, together) * (1 + 1e-9)


def test_experts_without_replicas() -> None:
    """Some of a layer's, in unequal numbers; 1 and 4 always work together."""
    use = np.array([5.0, 4.0, 9.0, 3.0, 4.0, 1.0])
    ranks = divide_experts(use, [4, 0, 3, 1], [2, 2])
    assert sorted(use[list(ids)].sum() for ids in ranks) == [8, 8]
    together = np.zeros((6, 6))
    together[1, 4] = together[4, 1] = 3
    ranks = divide_experts(np.full(6, 2.0), [0, 1, 4], [2, 1], together)
    assert ranks in (((0, 1), (4,)), ((0, 4), (1,)))
    assert divide_experts(use, [], [0, 0]) == ((), ())
    with pytest.raises(ValueError, match=r"1 experts cannot be divided into \[1, 1\]"):
        divide_experts(use, [2], [1, 1])


def test_idle_experts_and_layers() -> None:
    loads = np.zeros((2, 4))
    loads[0, 1] = 8
    placed = rebalance_experts(loads, 8, 1, 1, 4, np.zeros((2, 4, 4)))
    assert check(placed, loads, 8, 4)[0].max() == 2  # on every GPU
    assert list(placed.imbalance(loads)) == [1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": [1.0, 2.0]}, r"shape \(2,\), must be \[layers, experts\]"),
        ({"weight": [[1.0, -2.0, 0.0, 0.0]]}, "negative or not finite"),
        ({"weight": [[1.0, float("nan"), 0.0, 0.0]]}, "negative or not finite"),
        ({"num_replicas": 2}, "fewer than the 4 experts"),
        ({"num_replicas": 5}, "num_replicas is 5, must be a multiple of num_gpus 4"),
        ({"num_gpus": 0}, "num_gpus is 0, must be 1 or more"),
        ({"num_nodes": 3}, "num_gpus is 4, must be a multiple of num_nodes 3"),
        ({"num_groups": 3}, "the number of experts is 4, must be a multiple of num_groups 3"),
        ({"together": [[1.0]]}, r"together has shape \(1, 1\), must be \(1, 4, 4\)"),
    ],
)
def test_questions_that_are_none(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "weight": [[1.0, 2.0, 3.0, 4.0]],
        "num_replicas": 4, "num_groups": 1, "num_nodes": 1, "num_gpus": 4,
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        rebalance_experts(**arguments)  # type: ignore[arg-type]
