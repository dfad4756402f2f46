"""Where workers run, on described machines: laws, and what each door to the kernels chooses."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cli.machine_options import MachineOptions
from hybrid_moe.cpu_kernels.ceilings import bandwidth
from hybrid_moe.cpu_kernels.drivers.records import MAX_POOLS
from hybrid_moe.cpu_kernels.pool import affinity
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.planning import doctor
from hybrid_moe.runtime.arguments import pool_config
from tests.machines import MACHINES, Machine

MODEL = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"

EveryMachine = pytest.mark.parametrize("name", MACHINES)


@pytest.fixture
def on(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """Makes a machine of the table the present one, until the next call."""
    patches: list[pytest.MonkeyPatch] = []

    def switch(name: str) -> Machine:
        for patch in patches:
            patch.undo()
        patches[:] = [pytest.MonkeyPatch()]
        MACHINES[name].pretend(tmp_path / name, patches[0])
        return MACHINES[name]

    yield switch
    for patch in patches:
        patch.undo()


def _node_of(machine: Machine, cpu: int) -> int:
    return next(node for node, cpus in machine.usable_nodes.items() if cpu in cpus)


def _check(machine: Machine, config: PoolConfig) -> None:
    """The laws of `placement.py`, from the machine's description."""
    nodes = machine.usable_nodes
    cpus, masks, pools = config.worker_cpus(), config.worker_masks(), config.worker_pools()
    homes = config.placement.pools
    used = {node for own in homes for node in own}
    cores = {(node, name): c for node in used for name, c in machine.cores(node).items()}
    kinds = {key: min(map(machine.kind, members)) for key, members in cores.items()}
    core_of = {cpu: key for key, members in cores.items() for cpu in members}

    assert len(cpus) == config.threads <= machine.most_threads
    assert sorted(pools) == list(pools) and set(pools) == set(range(config.pools))
    assert config.threads_per_pool == tuple(Counter(pools)[p] for p in range(config.pools))
    if config.numa_nodes is None:
        assert used == set(nodes)

    # no processor twice, each pool on its nodes, whatever the system does within the masks
    assert len(set(cpus)) == len(cpus)
    for pool, cpu, mask in zip(pools, cpus, masks, strict=True):
        assert cpu in mask and set(mask) <= {c for node in homes[pool] for c in nodes[node]}
    for mask, workers in Counter(masks).items():
        assert workers <= len(mask)

    # cores before their second threads, and the fastest first
    taken = Counter(core_of[cpu] for cpu in cpus)
    crowded = {own: homes.count(own) - sum(key[0] in own for key in cores) for own in set(homes)}
    forced = sum(extra for extra in crowded.values() if extra > 0)  # pools that need a sibling
    assert len(taken) == min(config.threads - forced, len(cores))
    for own in set(homes):
        here = [key for key in cores if key[0] in own]
        alone = [kinds[key] for key in here if taken[key]]
        assert sorted(alone) == sorted(kinds[key] for key in here)[: len(alone)]

    # a processor of its own for each where the pools take every core; else none is singled out
    shared = machine.most_threads < len(machine.allowed)
    bound = not shared and config.threads >= len(cores)
    assert config.placement.bound == bound
    assert all(
        (mask == (cpu,)) == (bound or len(mask) == 1) for mask, cpu in zip(masks, cpus, strict=True)
    )
    for pool, mask in zip(pools, masks, strict=True):
        group = [key for key in cores if key[0] in homes[pool]]
        members = sum(homes[p] == homes[pool] for p in pools)
        if shared:  # others run on the same processors: the system chooses among all of them
            assert set(mask) == {cpu for key in group for cpu in cores[key]}
        elif not bound and members <= len(group):
            slowest = sorted(kinds[key] for key in group)[members - 1]
            assert len(mask) == sum(kinds[key] <= slowest for key in group)
            assert len({core_of[cpu] for cpu in mask}) == len(mask)


@given(data=st.data())
def test_laws(on: Callable[[str], Machine], data: st.DataObject) -> None:
    machine = on(data.draw(st.sampled_from(sorted(MACHINES)), "machine"))
    most = machine.most_threads
    threads = data.draw(st.none() | st.integers(1, most), "threads")
    pools = data.draw(st.none() | st.integers(1, min(threads or most, MAX_POOLS)), "pools")
    config = PoolConfig.choose(threads, pools)
    assert threads in (None, config.threads) and pools in (None, config.pools)
    _check(machine, config)


@given(data=st.data())
def test_laws_on_named_nodes(on: Callable[[str], Machine], data: st.DataObject) -> None:
    machine = on(data.draw(st.sampled_from(sorted(MACHINES)), "machine"))
    nodes = data.draw(
        st.lists(st.sampled_from(sorted(machine.usable_nodes)), min_size=1, max_size=MAX_POOLS)
    )
    size = {node: len(machine.usable_nodes[node]) for node in set(nodes)}
    most = min(machine.most_threads, sum(size.values()))
    if any(nodes.count(node) > size[node] for node in nodes) or len(nodes) > most:
        with pytest.raises(ValueError, match="pools"):
            PoolConfig.choose(most, None, tuple(nodes))
        return
    threads = data.draw(st.integers(len(nodes), most), "threads")
    config = PoolConfig.choose(threads, None, tuple(nodes))
    assert config.nodes == tuple((node,) for node in nodes)
    _check(machine, config)
    if most < machine.most_threads:
        with pytest.raises(ValueError, match=f"may use {most} processors"):
            PoolConfig(most + 1, len(nodes), tuple(nodes))


@EveryMachine
def test_every_door_chooses_the_same(name: str, on: Callable[[str], Machine]) -> None:
    machine = on(name)
    chosen = PoolConfig.choose()
    _check(machine, chosen)
    nodes = len(machine.usable_nodes)
    cores = sum(len(machine.cores(node)) for node in machine.usable_nodes)
    assert chosen.threads == max(1, min(cores, machine.most_threads))
    assert chosen.pools == min(nodes, MAX_POOLS, chosen.threads)
    request = _plan_options().plan(MODEL).request
    report = doctor.read_cores()
    assert ExpertsOptions().pool_config() == pool_config(None, None, None) == chosen
    assert bandwidth.read_places(chosen.threads)["all threads"] == chosen
    assert (request.threads, request.pools) == (chosen.threads, chosen.pools)
    assert (report.threads, report.pools) == (chosen.threads, chosen.pools)
    assert report.bound == chosen.placement.bound
    assert report.available == machine.most_threads
    assert set(report.cpuset) == set(machine.allowed)
    assert {node: list(cpus) for node, cpus in report.numa_nodes.items()} == machine.usable_nodes


def _plan_options(**given: object) -> MachineOptions:
    values: dict[str, object] = dict.fromkeys(MachineOptions.__dataclass_fields__)
    values |= {"ram": "64GB", "requests": 1, "chunk": 64, "ram_bandwidth": 20.0, "gmacs": 60.0}
    values |= {"dense": "bf16"}
    return MachineOptions(**{**values, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("threads", "pools", "message"), [(4, 5, "every pool needs"), (99, MAX_POOLS + 1, "at most 8")]
)
def test_a_plan_refuses_what_the_run_refuses(threads: int, pools: int, message: str) -> None:
    """A plan may be for another machine, but not for one that cannot be."""
    with pytest.raises(ValueError, match=message):
        _plan_options(threads=threads, pools=pools).plan(MODEL)


def test_equal_nodes_get_equal_threads(on: Callable[[str], Machine]) -> None:
    on("four nodes a socket")
    assert PoolConfig.choose(10).threads_per_pool == (3, 3, 2, 2)
    on("unequal nodes, numbers apart")
    assert PoolConfig.choose(6).threads_per_pool == (3, 3)
    assert PoolConfig.choose(26).threads_per_pool == (18, 8)


def test_neighbouring_nodes_share_a_pool(on: Callable[[str], Machine]) -> None:
    on("sixteen caches as nodes")
    pairs = tuple((n, n + 1) for n in range(0, 16, 2))
    config = PoolConfig.choose()
    assert config.placement.pools == pairs
    assert config.memory_nodes == pairs
    on("twenty-three nodes")
    runs = PoolConfig.choose().placement.pools
    assert tuple(itertools.chain(*runs)) == tuple(range(23))
    assert {len(run) for run in runs} == {2, 3}


@pytest.mark.parametrize(
    ("name", "arguments", "memory"),
    [
        ("two sockets, siblings n and n+32", {}, ((0,), (1,))),
        ("two sockets, siblings n and n+32", {"pools": 1}, ((0, 1),)),
        ("two sockets, siblings n and n+32", {"numa_nodes": (1,)}, ((1,),)),
        ("memory-only nodes", {}, ((),)),
        ("nodes without memory", {}, ((0,), (2,))),
        ("container with a cpuset", {}, ((),)),
    ],
)
def test_memory_comes_from_the_nodes_of_its_pool(
    name: str, arguments: dict[str, object], memory: tuple[tuple[int, ...], ...],
    on: Callable[[str], Machine],
) -> None:  # fmt: skip
    on(name)
    assert PoolConfig.choose(**arguments).memory_nodes == memory  # type: ignore[arg-type]


@pytest.mark.parametrize("bound_to", range(4))
def test_a_bound_caller_keeps_its_processor(
    bound_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is worker 0, so no other worker may be bound to that processor."""
    Machine({0: "0-3"}).pretend(tmp_path, monkeypatch)
    masks = {0: {bound_to}}
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: masks.get(pid, {0, 1, 2, 3}))
    cpus = PoolConfig.choose().worker_cpus()
    assert cpus[0] == bound_to and sorted(cpus) == [0, 1, 2, 3]


@pytest.mark.parametrize("bound_to", range(8))
def test_a_bound_caller_keeps_its_core(
    bound_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread of the core it is bound to, no other worker is on that core."""
    Machine({0: "0-7"}, core=lambda cpu: cpu % 4).pretend(tmp_path, monkeypatch)
    masks = {0: {bound_to}}
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: masks.get(pid, {*range(8)}))
    cpus = PoolConfig.choose().worker_cpus()
    assert cpus[0] % 4 == bound_to % 4 and {cpu % 4 for cpu in cpus[1:]} == {*range(4)} - {cpus[0]}


def test_a_worker_of_a_bound_thread_is_not_bound_with_it() -> None:
    """Threads inherit the mask of the one that starts them."""
    masks = PoolConfig.choose(1).worker_masks()
    seen: list[set[int]] = []

    def worker() -> None:
        affinity.bind_thread(masks[0])
        seen.append(os.sched_getaffinity(0))

    def caller() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        child = threading.Thread(target=worker)
        child.start()
        child.join()

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert seen == [set(masks[0])]
