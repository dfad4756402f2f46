"""The life of a layer's memory: experts that appear under running passes, parts of long batches
that take turns in it, and who holds it after `close`."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import experts as experts_module
from hybrid_moe.cpu_kernels import layer as layer_module
from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from hybrid_moe.cpu_kernels.tuning import INLINE_ENCODE_TOKENS
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors
from tests.cpu_kernels.cases import Array, Case, random_batch

CASE = Case.random(MXFP4, 64, 96, bias=True)
BATCH = random_batch(3, CASE.H, CASE.E, 2)
THREADS = range(1, min(2, usable_cores()) + 1)


# close


def forward(layer: ExpertLayer) -> None:
    layer.forward(*BATCH)


def long(layer: ExpertLayer) -> None:
    """Encoded by the workers, from a copy of x."""
    layer.forward(*random_batch(INLINE_ENCODE_TOKENS + 1, CASE.H, CASE.E, 2))


def seen_to_be_done(layer: ExpertLayer) -> None:
    job = layer.submit(*BATCH)
    layer.submit(*BATCH).wait()
    assert job.done


def dropped(layer: ExpertLayer) -> None:
    """Complete before `close`, though nobody has waited for it."""
    layer.submit(*BATCH)
    group = group_for(layer.pool)
    while not group._advance(group.control.submitted.value):
        continue


def several_parts(layer: ExpertLayer) -> None:
    assert len(BATCH[0]) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "MAX_TOKENS_PER_JOB", 1)
        layer.forward(*BATCH)


def refused(layer: ExpertLayer) -> None:
    layer.forward(*BATCH)
    layer._table["gate_up"][1, 0] = 0
    with pytest.raises(RuntimeError, match="expert 1"):
        layer.forward(*BATCH)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    "use",
    [forward, long, seen_to_be_done, dropped, several_parts, refused],
    ids=lambda u: u.__name__,
)
def test_nothing_holds_a_closed_layer(use: Callable[[ExpertLayer], None], threads: int) -> None:
    """No later pass is needed, and no garbage collection."""
    layer = CASE.layer(pool=PoolConfig(threads))
    use(layer)
    held = [weakref.ref(thing) for thing in (*layer._arenas, layer._table)]
    gc.disable()
    try:
        layer.close()
        assert layer.nbytes == 0 and all(ref() is None for ref in held)
        gone = weakref.ref(layer)
        del layer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("threads", THREADS)
def test_a_job_under_way_holds_a_closed_layer(threads: int) -> None:
    """Until somebody has waited for it."""
    case = Case.random(MXFP4, 256, 256, E=8, bias=True)
    batch = random_batch(300, case.H, case.E, 4)
    expected = case.layer().forward(*batch)
    layer = case.layer(pool=PoolConfig(threads))
    held = [weakref.ref(arena) for arena in layer._arenas]
    job = layer.submit(*batch)
    layer.close()
    del layer
    assert np.array_equal(job.wait(), expected)
    assert all(ref() is None for ref in held)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.load(0, CASE.experts[0]),
        lambda layer: layer.allocate(np.ones(CASE.E, np.bool_)),
        lambda layer: layer.unpack(0),
        lambda layer: layer.check_readable(0),
        lambda layer: layer.forward(*BATCH),
        lambda layer: layer.submit(*BATCH),
        lambda layer: layer.job_shape(1, 2),
    ],
    ids=[
        "load",
        "allocate",
        "unpack",
        "check_readable",
        "forward",
        "submit",
        "job_shape",
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_closed_layer_is_closed(use: Callable[[ExpertLayer], object], used: bool) -> None:
    layer = CASE.layer()
    if used:
        layer.forward(*BATCH)
    layer.close()
    layer.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this layer is closed"):
            use(layer)
    assert not layer.loaded.any() and layer.nbytes == 0


# load


@pytest.mark.parametrize("pools", range(1, min(2, usable_cores()) + 1))
@pytest.mark.parametrize("fmt", [MXFP4, BF16], ids=lambda fmt: fmt.name)
def test_an_expert_appears_whole(fmt: object, pools: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step of `load` a pass of another thread is refused, or right."""
    case = Case.random(fmt, 64, 96, E=3, bias=True)  # type: ignore[arg-type]
    batch = random_batch(3, case.H, case.E, 3)
    expected = case.layer().forward(*batch)
    layer = case.layer(pool=PoolConfig(pools, pools, (min(numa_nodes()),) * pools), only=[0, 1])
    only_before = layer.forward(*batch, skip=np.array([False, False, True]))
    layer = case.layer(pool=layer.pool, only=[0])
    layer._place[:] = [0, 1, 2]
    layer._arenas = [Arena(3 * layer.expert_nbytes(pool)) for pool in range(pools)]
    layer.load(0, case.experts[0])
    layer.load(1, case.experts[1])
    outcomes: list[str] = []

    def look() -> None:
        skipped = layer.forward(*batch, skip=np.array([False, False, True]))
        assert np.array_equal(skipped, only_before)
        try:
            out = layer.forward(*batch)
        except RuntimeError as error:
            outcomes.append("refused" if "expert 2" in str(error) else str(error))
        else:
            outcomes.append("right" if np.array_equal(out, expected) else "wrong")

    def watched(real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            look()
            real(*arguments)
            look()

        return step

    for name in ("pack_gate_up", "pack_rows", "publish_address"):
        monkeypatch.setattr(experts_module, name, watched(getattr(experts_module, name)))
    layer.load(2, case.experts[2])
    assert set(outcomes) == {"refused", "right"}
    assert outcomes == sorted(outcomes), "what was right is refused afterwards"
    assert outcomes.count("right") == 1, "the very last step publishes the expert"
    assert len(outcomes) == 2 * (2 * pools + 1)


def test_an_expert_loaded_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place and its biases' stay: a pass that reads the old ones reads memory that is there."""
    layer = CASE.layer()
    layer.forward(*BATCH)
    before = layer._table.copy()
    order = np.roll(np.arange(CASE.E), 1)
    turned = Case(CASE.fmt, [CASE.experts[e] for e in order])
    for expert, tensors in enumerate(turned.experts):
        layer.load(expert, tensors)
    assert np.array_equal(layer.forward(*BATCH), turned.layer().forward(*BATCH))
    assert np.array_equal(layer._table, before)
    plain = Case.random(MXFP4, 64, 96)
    for expert, tensors in enumerate(plain.experts):
        layer.load(expert, tensors)
    assert np.array_equal(layer.forward(*BATCH), plain.layer().forward(*BATCH))


def test_first_passes_of_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One descriptor is built, and what it points to lives as long as jobs that have it."""
    layer = CASE.layer()
    expected = CASE.layer().forward(*BATCH)
    describe, built = layer_module.describe, []
    barrier = threading.Barrier(4)

    def counted(*arguments: Any) -> object:
        built.append(threading.get_ident())
        return describe(*arguments)

    monkeypatch.setattr(layer_module, "describe", counted)
    results: list[Array] = []

    def first() -> None:
        barrier.wait()
        results.append(layer.forward(*BATCH))

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(results) == 4 and all(np.array_equal(out, expected) for out in results)


def test_a_descriptor_owns_what_it_points_to() -> None:
    """Every address in it, and in the table of experts, is in memory that jobs own."""
    layer = CASE.layer()
    layer.forward(*BATCH)
    ready = layer._ready()
    owned = [own for own in ready.memory if isinstance(own, np.ndarray)]
    owned += [arena.bytes for own in ready.memory if isinstance(own, list) for arena in own]

    def is_owned(address: int) -> bool:
        return any(0 <= address - own.ctypes.data < own.nbytes for own in owned)

    descriptor = ready.descriptor
    pointers = [descriptor.packed.address, descriptor.blocks.address, descriptor.strips.address]
    assert all(map(is_owned, [descriptor.parameters, *pointers]))
    shares = layer._table.flatten().tolist()
    assert all(is_owned(address) for share in shares for address in share)


# the memory of jobs


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", [16 * 8, 16 * 8 - 7, 8 + 1])
def test_a_long_batch_takes_the_memory_of_one_job(
    tokens: int, threads: int, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the same bits as in one piece, whatever becomes of the inputs after `submit`."""
    batch = random_batch(tokens, CASE.H, CASE.E, 2)
    layer = CASE.layer(pool=PoolConfig(threads))
    expected = layer.forward(*batch)
    monkeypatch.setattr(layer_module, "MAX_TOKENS_PER_JOB", 8)
    IDLE.clear()
    mapped.clear()
    shape = layer.job_shape(8, 2)
    job = layer.submit(*batch)
    for array in batch:
        array[...] = 0
    assert np.array_equal(job.wait(), expected)
    assert mapped == [shape.nbytes]
    assert [each.nbytes for each in IDLE._idle] == [shape.nbytes]


def test_a_short_batch_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`submit` of what fits into one job returns at once; of more, when the last part has begun."""
    layer = CASE.layer()
    waits: list[int] = []
    group = group_for(layer.pool)
    wait = group.wait
    monkeypatch.setattr(layer_module, "MAX_TOKENS_PER_JOB", 8)
    monkeypatch.setattr(group, "wait", lambda number: (waits.append(number), wait(number))[1])
    jobs = {}
    for tokens in (0, 1, 8, 9, 24):
        waits.clear()
        jobs[tokens] = layer.submit(*random_batch(tokens, CASE.H, CASE.E, 2))
        assert len(waits) == max(0, -(-tokens // 8) - 1)
    for tokens, job in jobs.items():
        assert job.wait().shape == (tokens, CASE.H)


def test_an_unloaded_expert_in_a_later_part(
    mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error leaves nothing under way, and the memory serves the next batch."""
    layer = CASE.layer(only=[0, 1, 2, 3])
    monkeypatch.setattr(layer_module, "MAX_TOKENS_PER_JOB", 8)
    group = group_for(layer.pool)
    x, ids, weights = random_batch(20, CASE.H, CASE.E, 2)
    ids[:] %= 4
    expected = layer.forward(x, ids, weights)
    IDLE.clear()
    ids[17] = 4
    with pytest.raises(RuntimeError, match="expert 4"):
        layer.forward(x, ids, weights)
    assert group.is_complete(group.control.submitted.value) and not group._in_flight
    mapped.clear()
    ids[17] = 0
    layer.forward(x, ids, weights)
    assert not mapped and expected.shape == (20, CASE.H)


@pytest.mark.parametrize("tokens", [2, INLINE_ENCODE_TOKENS + 1])
@pytest.mark.parametrize("first", [1, 4])
def test_passes_of_other_numbers_of_experts(first: int, tokens: int) -> None:
    """Memory that was made for one k is not taken for another."""
    layer, other = CASE.layer(), CASE.layer()
    for k in (first, 5 - first, 3, first):
        batch = random_batch(tokens, CASE.H, CASE.E, k)
        out = layer.forward(*batch)
        shape = layer.job_shape(tokens, k)
        assert shape.top_k == k and IDLE._idle[-1].shape == shape
        IDLE.clear()
        assert np.array_equal(out, other.forward(*batch))


def test_loading_while_closing() -> None:
    """A load that has begun writes into memory that is still there, and leaves nothing behind."""
    layer = CASE.layer()
    tensors: ExpertTensors = CASE.experts[0]
    real = experts_module.pack_rows
    with pytest.MonkeyPatch.context() as patch:

        def pack(*arguments: object) -> None:
            layer.close()
            gc.collect()
            real(*arguments)  # type: ignore[arg-type]

        patch.setattr(experts_module, "pack_rows", pack)
        with pytest.raises(RuntimeError, match="this layer is closed"):
            layer.load(0, tensors)
    assert not layer.loaded.any() and layer.nbytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        layer.forward(*BATCH)
