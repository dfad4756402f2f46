"""Graph jobs: compiled post and wait functions over fixed buffers, as a CUDA graph replays them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT, IDS_PASS
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.streams.graph_job import GraphJob, Report
from hybrid_moe.formats.numbers import f32_to_bf16
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix

E, H, I, T, K = 6, 64, 96, 5, 3


def _layer(resident: np.ndarray, seed: int = 0) -> ExpertLayer:
    rng = np.random.default_rng(seed)
    fmt = DENSE_FORMATS["MXFP4"]
    # a pool of its own: a group whose callers never work stays that way
    layer = ExpertLayer(fmt, E, H, I, pool=PoolConfig(1, numa_nodes=(0,)))
    layer.allocate(resident)
    for expert in range(E):
        shapes = ((I, H), (I, H), (H, I))
        matrices = [Matrix(*fmt.encode(rng.standard_normal(s).astype(np.float32))) for s in shapes]
        if resident[expert]:
            layer.load(expert, ExpertTensors(*matrices))
    return layer


@dataclass
class Buffers:
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    skip: np.ndarray
    out: np.ndarray

    @classmethod
    def random(cls, seed: int) -> Buffers:
        rng = np.random.default_rng(seed)
        return cls(
            f32_to_bf16(rng.standard_normal((T, H)).astype(np.float32)),
            rng.integers(0, E, (T, K)),
            rng.random((T, K), np.float32),
            np.zeros(E, bool),
            np.zeros((T, H), np.uint16),
        )

    def job(self, layer: ExpertLayer, *, ignored_ids: int = IDS_COUNT) -> GraphJob:
        names = ("x", "ids", "weights", "skip", "out")
        at = {name: getattr(self, name).ctypes.data for name in names}
        size = self.out.itemsize
        memory = JobMemory.new(layer.job_shape(T, K, size))
        return layer.graph_job(Batch(T, K, **at, out_size=size), memory, ignored_ids=ignored_ids)


def _call(function: int, user_data: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(user_data)


def _replay(job: GraphJob) -> None:
    _call(job.post_fn, job.user_data)
    _call(job.wait_fn, job.user_data)


def test_replays_follow_the_buffers() -> None:
    layer = _layer(np.ones(E, bool))
    buffers = Buffers.random(1)
    job = buffers.job(layer)
    for seed in range(2, 22):
        new = Buffers.random(seed)
        for name in ("x", "ids", "weights"):
            np.copyto(getattr(buffers, name), getattr(new, name))
        buffers.skip[:] = np.random.default_rng(seed).random(E) < 0.3
        buffers.out[:] = 0xFFFF
        _replay(job)
        expected = layer.forward(buffers.x, buffers.ids, buffers.weights, buffers.skip)
        np.testing.assert_array_equal(buffers.out, expected)
    assert layer.report() == Report(0, 0, -1)


def test_several_jobs_may_be_posted_before_any_wait() -> None:
    layer = _layer(np.ones(E, bool))
    runs = [Buffers.random(seed) for seed in range(40)]  # more than the ring holds
    jobs = [run.job(layer) for run in runs]
    for start in range(0, len(jobs), 10):
        for job in jobs[start : start + 10]:
            _call(job.post_fn, job.user_data)
        for job in jobs[start : start + 10]:
            _call(job.wait_fn, job.user_data)
    for run in runs:
        np.testing.assert_array_equal(run.out, layer.forward(run.x, run.ids, run.weights))


@pytest.mark.parametrize("ignored_ids", [IDS_COUNT, IDS_PASS])
def test_ignored_ids_are_reported_once(ignored_ids: int) -> None:
    layer = _layer(np.ones(E, bool))
    buffers = Buffers.random(3)
    buffers.ids[0] = (-1, E, 2)
    job = buffers.job(layer, ignored_ids=ignored_ids)
    _replay(job)
    _replay(job)
    assert layer.report().ignored == (4 if ignored_ids == IDS_COUNT else 0)
    assert layer.report().ignored == 0


@pytest.mark.parametrize("given_up", [False, True])
def test_sums_that_are_not_rounded(given_up: bool) -> None:
    """NaN where a run fails; what is given up writes nothing behind the room that it has."""
    layer = _layer(np.ones(E, bool))
    buffers = Buffers.random(5)
    buffers.out = np.zeros((T, H), np.float32)
    job = buffers.job(layer)
    if given_up:
        _call(drivers.addresses()["close_host"], job.user_data)
    _replay(job)
    if given_up:
        assert np.isnan(buffers.out).all()
        return
    expected = layer.forward(buffers.x, buffers.ids, buffers.weights)
    np.testing.assert_array_equal(f32_to_bf16(buffers.out), expected)


def test_a_missing_expert_gives_nan_and_a_report() -> None:
    resident = np.ones(E, bool)
    resident[4] = False
    layer = _layer(resident)
    buffers = Buffers.random(4)
    buffers.ids[2, 1] = 4
    job = buffers.job(layer)
    _replay(job)
    assert (buffers.out == 0x7FC0).all()
    report = layer.report()
    assert (report.missing, report.missing_expert) == (1, 4)
    buffers.skip[4] = True  # now the GPU has it
    _replay(job)
    expected = layer.forward(buffers.x, buffers.ids, buffers.weights, buffers.skip)
    np.testing.assert_array_equal(buffers.out, expected)
    assert layer.report().missing == 0
