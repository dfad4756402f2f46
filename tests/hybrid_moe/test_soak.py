"""Models come and go in one process: memory and threads return to where they were.

HYBRID_MOE_SOAK says how many; 500 take some minutes.
"""

from __future__ import annotations

import os

import pytest

from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from tests.cpu_kernels.toolbox import run_script

COUNT = int(os.environ.get("HYBRID_MOE_SOAK", "15"))

_PRELUDE = """
import gc, os, sys
import numpy as np
import torch
import hybrid_moe
from hybrid_moe.cpu_kernels import memory
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.tensors import ExpertTensors, Matrix

count, threads, closes = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "close"
E, K, H, I = 32, 4, 256, 256
NBYTES, BIAS_NBYTES = 2 * E * 3 * H * I, 4 * E * (2 * I + H)
rng = np.random.default_rng(0)
torch.manual_seed(0)

def state():
    gc.collect()
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(memory._live), len(os.listdir("/proc/self/task")), resident

def batches(tokens):
    ids = rng.permuted(np.tile(np.arange(E), (tokens, 1)), axis=1)[:, :K].astype(np.int64)
    return ids, rng.random((tokens, K)).astype(np.float32)
"""

_LAYERS = """
bits = [(rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for shape in ((I, H), (I, H), (H, I))]
bias = [np.ones(n, np.float32) for n in (I, I, H)]
expert = ExpertTensors(*(Matrix(m, None, b) for m, b in zip(bits, bias)))

def model():
    layer = ExpertLayer(BF16, E, H, I, pool=PoolConfig(threads))
    layer.allocate(np.ones(E, bool))
    for e in range(E):
        layer.load(e, expert)
    assert layer.nbytes == NBYTES + BIAS_NBYTES
    for tokens in (1, 3, 20):
        x = np.ones((tokens, H), np.uint16)
        layer.forward(x, *batches(tokens))
    job = layer.submit(x, *batches(tokens))
    layer.submit(x, *batches(tokens)).wait()
    if closes:
        layer.close()
"""

_WRAPPERS = """
weights = [torch.randn(E, *shape).to(torch.bfloat16) for shape in ((I, H), (I, H), (H, I))]

def model():
    wrappers = []
    for index in range(2):
        wrappers.append(hybrid_moe.KTMoEWrapper(
            layer_idx=index, num_experts=E, num_experts_per_tok=K, hidden_size=H,
            moe_intermediate_size=I, cpuinfer_threads=threads, method="BF16",
            max_deferred_experts_per_token=index))
        wrappers[-1].load_weights_from_tensors(*weights)
    for tokens in (1, 3, 20):
        x = torch.ones(tokens, H, dtype=torch.bfloat16)
        for wrapper in wrappers:
            ids, w = map(torch.from_numpy, batches(tokens))
            wrapper.forward(x, ids, w)
    wrappers[0].submit_forward(x, ids, w)  # and never a sync
    if closes:
        for wrapper in wrappers:
            wrapper.close()
"""

_REST = """
for _ in range(3):  # allocators, caches and threads take what they keep
    model()
group_for(PoolConfig(threads)).wait(group_for(PoolConfig(threads)).control.submitted.value)
before = state()
for _ in range(count):
    model()
group_for(PoolConfig(threads)).wait(group_for(PoolConfig(threads)).control.submitted.value)
after = state()
print(before, after)
assert after[:2] == before[:2], "arenas or threads stay"
assert after[2] - before[2] < NBYTES, "a layer's memory stays"
assert max(map(len, memory._live)) < NBYTES, "a layer stays"
"""


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize(
    ("level", "threads"),
    [
        ("layers", 1),
        ("wrappers", min(2, usable_cores())),
        pytest.param("layers", min(2, usable_cores()), marks=pytest.mark.full),
        pytest.param("wrappers", 1, marks=pytest.mark.full),
    ],
)
def test_models_come_and_go(level: str, threads: int, how: str) -> None:
    """Used in all ways, closed or only dropped, with a job that nobody has waited for."""
    code = _PRELUDE + {"layers": _LAYERS, "wrappers": _WRAPPERS}[level] + _REST
    arguments = f"import sys; sys.argv[1:] = {[str(COUNT), str(threads), how]}\n"
    result = run_script(arguments + code, timeout=60 + 5 * COUNT)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
