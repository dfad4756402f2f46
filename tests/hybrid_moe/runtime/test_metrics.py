"""`hybrid_moe.metrics()`: counts beside what was really asked for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import hybrid_moe
from hybrid_moe.cpu_kernels.use_counts import LayerUse
from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.formats.table import BF16
from hybrid_moe.runtime.metrics import Metrics, metrics

E, H, I, K = 6, 64, 96, 2


def wrapper(layer: int, mask: list[bool] | None = None, **options: Any) -> Any:
    made = hybrid_moe.KTMoEWrapper(
        layer_idx=layer, num_experts=E, num_experts_per_tok=K, hidden_size=H,
        moe_intermediate_size=I, cpuinfer_threads=1, threadpool_count=1, method="BF16",
        gpu_experts_mask=None if mask is None else torch.tensor(mask), **options,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(layer)
    gate, up, down = (
        torch.randn(E, *shape, generator=rng).bfloat16() for shape in ((I, H), (I, H), (H, I))
    )
    made.load_weights_from_tensors(gate, up, down)
    return made


def run(layer: Any, ids: list[list[int]]) -> None:
    chosen = torch.tensor(ids)
    layer.forward(torch.randn(len(ids), H).bfloat16(), chosen, torch.rand(chosen.shape))


IDS = [[[0, 1], [0, 2], [5, -1]], [[3, 4]], [[1, 0]] * 20]
"""Calls. In the first, expert 0 has two tokens and is read once; an id is out of range."""


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("hot", [[], [0, 3]])
def test_what_is_counted(hot: list[int], backend: str | None) -> None:
    mask = [e in hot for e in range(E)]
    before = hybrid_moe.metrics()
    layer = wrapper(3, mask, gpu_backend=backend)
    for ids in IDS:
        run(layer, ids)
    found = hybrid_moe.metrics() - before
    pairs = [e for ids in IDS for token in ids for e in token if e >= 0]
    read = sum(len({e for token in ids for e in token if e >= 0} - set(hot)) for ids in IDS)
    assert found.layers["experts layer 3"] == LayerUse(
        launches=len(IDS),
        tokens=sum(map(len, IDS)),
        hot_pairs=sum(e in hot for e in pairs),
        cold_pairs=sum(e not in hot for e in pairs),
        read_bytes=read * packed_nbytes(BF16, H, I),
        busy_ns=found.layers["experts layer 3"].busy_ns,
    )
    assert found.hit_rate == pytest.approx(sum(e in hot for e in pairs) / len(pairs))
    assert found.ignored_ids == 1 and found.faults == 0
    assert found.waits == len(IDS) and found.waited_seconds > 0
    assert found.tokens >= sum(map(len, IDS))
    assert found.busy_seconds > 0 and found.bandwidth is not None
    assert found.bandwidth_share(found.bandwidth) == 1.0
    layer.close()


def test_a_layer_that_is_gone_is_counted_still() -> None:
    before = metrics()
    for _ in range(3):
        layer = wrapper(4)
        run(layer, [[0, 1]])
        layer.close()
        del layer
    assert (metrics() - before).layers["experts layer 4"].cold_pairs == 3 * K


def test_layers_without_an_expert_on_the_cpu() -> None:
    before = metrics()
    layer = wrapper(5, [True] * E, gpu_backend="torch")
    run(layer, [[0, 1], [2, -1]])
    found = metrics() - before
    assert found.hot_pairs_alone == found.hot_pairs == 3
    assert found.hit_rate == 1.0 and found.cold_pairs == 0


def test_moves() -> None:
    layer = wrapper(6, [True] + [False] * (E - 1), gpu_backend="torch", gpu_slots=2)
    before = metrics()
    layer.promote(4)
    layer.demote(0)
    found = metrics() - before
    assert (found.promotions, found.demotions) == (1, 1)
    assert found.moved_bytes == 2 * packed_nbytes(BF16, H, I)


def test_before_anything() -> None:
    nothing = Metrics({}, *[0] * 8)
    assert nothing.hit_rate is None and nothing.bandwidth is None and nothing.tokens == 0
    assert nothing.bandwidth_share(1e9) is None
    with pytest.raises(ValueError, match="ceiling is 0"):
        nothing.bandwidth_share(0)


def test_prometheus() -> None:
    use = LayerUse(2, 7, 3, 11, 1 << 40, 1_500_000_000)
    made = Metrics({"layers.0": use, 'a "name"\n': LayerUse()}, 1, 5, 0.25, 2, 1, 99, 4, 0)
    text = made.prometheus()
    sample = re.compile(r'^hybrid_moe_(\w+)(?:\{layer="((?:[^"\\]|\\.)*)"\})? (\S+)$')
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = sample.match(line)
            assert match, line
            found[match[1], match[2]] = float(match[3])
    assert found["read_bytes_total", "layers.0"] == 1 << 40
    assert found["busy_seconds_total", "layers.0"] == 1.5
    assert found["cold_pairs_total", r"a \"name\"\n"] == 0
    assert found["moved_bytes_total", None] == 99
    assert found["waited_seconds_total", None] == 0.25
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == len({name for name, _ in found})
    assert all(name.endswith("_total") for name in names)
    assert text.endswith("\n")


def test_counts_are_the_same_for_numpy_callers() -> None:
    """`ExpertLayer` is used without a wrapper, too: by Transformers' models."""
    from hybrid_moe.cpu_kernels.layer import ExpertLayer
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig
    from hybrid_moe.formats.tensors import ExpertTensors
    from tests.cpu_kernels.cases import random_matrix

    layer = ExpertLayer(BF16, 2, H, I, pool=PoolConfig.choose(1, 1), name="alone")
    layer.allocate(np.ones(2, np.bool_), biases=False)
    rng = np.random.default_rng(0)
    for expert in range(2):
        gate, up, down = (random_matrix(BF16, rng, *shape) for shape in ((I, H), (I, H), (H, I)))
        layer.load(expert, ExpertTensors(gate, up, down))
    before = metrics()
    layer.forward(np.zeros((1, H), np.uint16), np.array([[0, 1]]), np.ones((1, 2), np.float32))
    use = (metrics() - before).layers["alone"]
    assert (use.launches, use.tokens, use.cold_pairs) == (1, 1, 2)
    assert use.read_bytes == 2 * packed_nbytes(BF16, H, I)
