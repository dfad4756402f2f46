"""Experts on several GPUs (or NUMA nodes): balanced packing with replication.

A layer is as fast as its fullest GPU. The problem is that of DeepSeek's Expert Parallelism Load
Balancer (https://github.com/deepseek-ai/EPLB, described in the DeepSeek-V3 technical report,
arXiv 2412.19437, section 3.4): R replicas of E experts on G GPUs, R / G on each; an expert with
many tokens may have several replicas, which share them. Two policies, as there:

    hierarchical   groups of experts go to nodes whole, since a token's experts are chosen in few
                   groups; then replicas are made within each node, and packed to its GPUs
    global         replicas of all experts, packed to all GPUs: where groups do not divide by nodes

Here too the start is greedy: the busiest expert gets the next replica, the heaviest replica goes
to the lightest GPU. A search follows (`packing_loops.balance`): it exchanges replicas of the
fullest GPU, and moves replicas from expert to expert, as long as the fullest GPU becomes lighter.
The result is never worse than where it starts.

With counts of which experts a token uses together, those are kept apart afterwards, as far as no
GPU becomes fuller: one token's experts work at the same time only on different GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

KICKS = 16
"""Searches that begin from the best packing with a few random exchanges."""


@dataclass(frozen=True, eq=False)
class ReplicaPlacement:
    """Which replica is where. GPU g has the replicas g x R / G to (g + 1) x R / G - 1.

    Attributes:
        physical_to_logical: int64 [L, R], the expert of each replica.
        logical_to_physical: int64 [L, E, X], the replicas of each expert, ascending, then -1.
        counts: int64 [L, E], how many replicas each expert has.
        num_gpus: G.
    """

    physical_to_logical: I64
    logical_to_physical: I64
    counts: I64
    num_gpus: int

    def gpu_loads(self, weight: Any) -> F64:
        """float64 [L, G]: load of each GPU, where experts have the loads `weight` [L, E] and their
        replicas share them equally."""
        share = np.asarray(weight, np.float64) / self.counts
        of_replica = np.take_along_axis(share, self.physical_to_logical, 1)
        loads: F64 = of_replica.reshape(len(share), self.num_gpus, -1).sum(2)
        return loads

    def imbalance(self, weight: Any) -> F64:
        """float64 [L]: load of the fullest GPU over the mean, 1 where all are equally full."""
        loads = self.gpu_loads(weight)
        mean = loads.mean(1)
        return np.where(mean > 0, loads.max(1) / np.where(mean > 0, mean, 1), 1.0)


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    together: Any = None,
) -> ReplicaPlacement:
    """Replicas of every layer's experts on GPUs of equal memory.

    Args:
        weight: [L, E], load of each expert: its tokens, in any unit.
        num_replicas: R, a multiple of `num_gpus`, E at least.
        num_groups: groups of consecutive experts, as many in each. They stay whole on a node if
            `num_nodes` divides them.
        num_nodes: nodes, whose GPUs have the faster connection.
        num_gpus: G in all, a multiple of `num_nodes`.
        together: [L, E, E], how many tokens use both of two experts; None if nobody knows.

    Raises:
        ValueError: shapes or numbers that do not divide, or a load that is negative or not finite.
    """
    loads = np.array(weight, np.float64)
    _check(loads, num_replicas, num_groups, num_nodes, num_gpus)
    L, E = loads.shape
    pairs = None if together is None else np.array(together, np.float64)
    if pairs is not None and (pairs.shape != (L, E, E) or not (pairs >= 0).all()):
        raise ValueError(f"together has shape {pairs.shape}, must be {(L, E, E)}, not below 0")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    physical = np.empty((L, num_replicas), np.int64)
    for layer in range(L):
        beside = None if pairs is None else pairs[layer]
        physical[layer] = _pack_layer(
            loads[layer], num_replicas, num_groups, num_nodes, num_gpus, beside
        )
    counts = np.stack([np.bincount(row, minlength=E) for row in physical])
    places = np.full((L, E, counts.max()), -1, np.int64)
    for layer, row in enumerate(physical):
        for expert in range(E):
            found = np.flatnonzero(row == expert)
            places[layer, expert, : len(found)] = found
    return ReplicaPlacement(physical, places, counts, num_gpus)


def divide_experts(
    use: F64, experts: Sequence[int], sizes: Sequence[int], together: Any = None
) -> tuple[tuple[int, ...], ...]:
    """Some experts of one layer on GPUs, without replicas.

    Args:
        use: [E], load of each expert of the layer.
        experts: ids of those that are divided.
        sizes: how many each GPU gets, len(experts) in all.
        together: [E, E], how many tokens use both of two experts; None if nobody knows.

    Returns:
        The ids of each GPU, ascending.
    """
    from hybrid_moe.placement.packing_loops import balance, deal, spread

    ids = np.array(sorted(experts), np.int64)
    if int(sum(sizes)) != len(ids):
        raise ValueError(f"{len(ids)} experts cannot be divided into {list(sizes)}")
    loads, each = np.array(use, np.float64)[ids], np.arange(len(ids))
    pack = deal(loads, _descending(loads), np.array(sizes, np.int64))
    balance(loads, each, pack, len(sizes), KICKS)
    if together is not None:
        beside = np.ascontiguousarray(np.array(together, np.float64)[np.ix_(ids, ids)])
        spread(loads, beside, each, pack, len(sizes))
    return tuple(tuple(ids[pack == gpu].tolist()) for gpu in range(len(sizes)))


def _descending(weights: F64) -> I64:
    return np.argsort(-weights, kind="stable")


def _even(items: int, packs: int) -> I64:
    return np.full(packs, items // packs, np.int64)


def _pack_layer(
    loads: F64, replicas: int, groups: int, nodes: int, gpus: int, together: F64 | None
) -> I64:
    """The experts of a layer's replicas, GPU after GPU."""
    from hybrid_moe.placement.packing_loops import balance, deal

    of_group = loads.reshape(groups, -1).sum(1)
    greedy = deal(of_group, _descending(of_group), _even(groups, nodes))
    balanced = greedy.copy()
    balance(of_group, np.arange(groups), balanced, nodes, KICKS)
    # the fullest GPU may be lighter under either: nodes that are balanced best are not it always
    chosen: I64 | None = None
    least = np.inf
    for node_of_group in (greedy, balanced) if nodes > 1 else (greedy,):
        found, fullest = _pack_nodes(loads, replicas, node_of_group, nodes, gpus, together)
        if fullest < least:
            chosen, least = found, fullest
    assert chosen is not None
    return chosen


def _pack_nodes(
    loads: F64, replicas: int, node_of_group: I64, nodes: int, gpus: int, together: F64 | None
) -> tuple[I64, float]:
    """The replicas of nodes whose groups are known, and the load of the fullest GPU."""
    from hybrid_moe.placement.packing_loops import balance, deal, replicate, spread

    node_of = np.repeat(node_of_group, len(loads) // len(node_of_group))
    rows, fullest = [], 0.0
    for node in range(nodes):
        ids = np.flatnonzero(node_of == node)
        own = loads[ids]
        expert = replicate(own, replicas // nodes)
        share = own / np.bincount(expert, minlength=len(own))
        weights = share[expert]
        pack = deal(weights, _descending(weights), _even(len(expert), gpus // nodes))
        fullest = max(fullest, balance(own, expert, pack, gpus // nodes, KICKS))
        if together is not None:
            beside = np.ascontiguousarray(together[np.ix_(ids, ids)])
            np.fill_diagonal(beside, own)
            spread(own, beside, expert, pack, gpus // nodes)
        rows.append(ids[expert[np.argsort(pack, kind="stable")]])
    return np.concatenate(rows), fullest


def _check(loads: F64, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"weight has shape {loads.shape}, must be [layers, experts]")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ValueError("weight has loads that are negative or not finite")
    E = loads.shape[1]
    numbers = {"num_groups": groups, "num_nodes": nodes, "num_gpus": gpus}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}, must be 1 or more")
    if replicas < E:
        raise ValueError(f"num_replicas is {replicas}, fewer than the {E} experts")
    for name, number, of, by in (
        ("num_replicas", replicas, "num_gpus", gpus),
        ("num_gpus", gpus, "num_nodes", nodes),
        ("the number of experts", E, "num_groups", groups),
    ):
        if number % by:
            raise ValueError(f"{name} is {number}, must be a multiple of {of} {by}")
