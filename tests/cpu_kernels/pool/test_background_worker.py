"""A group whose callers stop working: a thread takes worker 0's place while a caller is it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import layer as layer_module
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Case, random_batch


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.006])
def test_the_switch_waits_for_a_working_caller(
    monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    case = Case.random(MXFP4, 256, 512, E=8)
    batch = random_batch(400, 256, 8, 4)
    expected = case.layer(pool=PoolConfig(1)).forward(*batch)

    group = PoolGroup(PoolConfig(2))
    monkeypatch.setattr(layer_module, "group_for", lambda _: group)
    layer = case.layer(pool=group.config)
    job = layer.submit(*batch)

    def switch() -> None:
        time.sleep(delay)
        group.start_background_worker()

    thread = threading.Thread(target=switch)
    thread.start()
    first = job.wait()
    thread.join()
    assert not group.caller_works
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(layer.forward(*batch), expected)
    group.stop()
