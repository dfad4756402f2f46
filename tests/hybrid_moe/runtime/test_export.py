"""Experts written to host buffers for GPU layers: the checkpoint's codes, bf16 scales, cut for
ranks. That this is the layout which kt-kernel 0.7.2 writes was checked against it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.wrapper import KTMoEWrapper
from tests.hybrid_moe.cases import E, H, I, Weights, wrapper

WEIGHTS = Weights.random()
NAMES = ("w13_weight_ptrs", "w13_scale_ptrs", "w2_weight_ptrs", "w2_scale_ptrs")


class HostBuffers:
    """What a runtime allocates: one buffer per rank, with guards behind each."""

    GUARD = 64

    def __init__(self, fmt: WeightFormat, ranks: int) -> None:
        rows, columns = 2 * I // ranks, I // ranks
        shapes = {"w13_weight_ptrs": fmt.code_shape(rows, H)}
        shapes["w2_weight_ptrs"] = fmt.code_shape(H, columns)
        self.dtypes = dict.fromkeys(shapes, fmt.code_dtype)
        for name, shape in (
            ("w13_scale_ptrs", fmt.scale_shape(rows, H)),
            ("w2_scale_ptrs", fmt.scale_shape(H, columns)),
        ):
            shapes[name], self.dtypes[name] = shape or (0, 0), np.dtype(ml_dtypes.bfloat16)
            if fmt is INT8:
                self.dtypes[name] = np.dtype(np.float16)
        self.shapes, self.ranks = shapes, ranks
        self.memory = {
            name: [np.full(self.nbytes(name) + self.GUARD, 0xA5, np.uint8) for _ in range(ranks)]
            for name in NAMES
        }

    def nbytes(self, name: str) -> int:
        return int(np.prod(self.shapes[name])) * self.dtypes[name].itemsize

    @property
    def pointers(self) -> list[list[int]]:
        return [
            [m.ctypes.data if self.nbytes(name) else 0 for m in self.memory[name]] for name in NAMES
        ]

    def __getitem__(self, name: str) -> list[Any]:
        parts = []
        for memory in self.memory[name]:
            assert (memory[self.nbytes(name) :] == 0xA5).all(), f"{name}: written past its end"
            data = memory[: self.nbytes(name)].view(self.dtypes[name])
            parts.append(data.reshape(self.shapes[name]))
        return parts


def loaded(method: str = "MXFP4", **arguments: Any) -> KTMoEWrapper:
    return WEIGHTS.load(wrapper(method=method, **arguments))


@pytest.mark.parametrize("method", DENSE_FORMATS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_together_hold_the_expert(method: str, ranks: int) -> None:
    fmt = DENSE_FORMATS[method]
    mapping = torch.arange(E).flip(0)
    w = WEIGHTS.load(wrapper(method=method), mapping)
    for expert in (0, E - 1):
        buffers = HostBuffers(fmt, ranks)
        assert w.submit_write_weight_scale_to_buffer(ranks, expert, *buffers.pointers) is None
        w.sync_write_weight_scale_to_buffer()
        logical = int(mapping[expert])
        for part, kind in enumerate(("weight", "scale")):
            if kind == "scale" and fmt.scale is None:
                continue
            stored = {}
            for name in ("gate", "up", "down"):
                array = WEIGHTS.quantized(name, fmt)[part]
                assert array is not None
                stored[name] = array[logical]
            if kind == "scale" and fmt is not INT8:  # 2^(s - 127), exact in bf16
                stored = {n: np.ldexp(1.0, s.astype(int) - 127) for n, s in stored.items()}
            w13 = np.stack(buffers[f"w13_{kind}_ptrs"]).reshape(ranks, 2, I // ranks, -1)
            for at, name in enumerate(("gate", "up")):
                np.testing.assert_array_equal(w13[:, at].reshape(I, -1), stored[name])
            w2 = np.concatenate(buffers[f"w2_{kind}_ptrs"], axis=1)
            np.testing.assert_array_equal(w2, stored["down"])


def test_several_experts_may_be_under_way_and_the_layer_still_runs() -> None:
    w, fmt = loaded(), DENSE_FORMATS["MXFP4"]
    each = [HostBuffers(fmt, 1) for _ in range(E)]
    for expert, buffers in enumerate(each):
        w.submit_write_weight_scale_to_buffer(1, expert, *buffers.pointers)
    x = torch.ones(1, H, dtype=torch.bfloat16)
    w.forward(x, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    w.sync_write_weight_scale_to_buffer()
    w.sync_write_weight_scale_to_buffer()  # nothing is under way
    codes = WEIGHTS.quantized("down", fmt)[0]
    for expert, buffers in enumerate(each):
        np.testing.assert_array_equal(buffers["w2_weight_ptrs"][0], codes[expert])
    w.close()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank count": ({"ranks": 0}, ValueError, "gpu_tp_count is 0"),
    "ranks cut a group": ({"ranks": 2}, ValueError, "gpu_tp_count is 2, must cut .* 96"),
    "no number": ({"ranks": "1"}, TypeError, "gpu_tp_count must be an integer"),
    "expert out of range": ({"expert": E}, IndexError, f"expert {E} is not loaded"),
    "expert on the GPU": ({"expert": 1}, IndexError, "expert 1 is not loaded"),
    "pointers missing": ({"w13_weight_ptrs": []}, ValueError, "w13_weight_ptrs has 0 pointers"),
    "null": ({"w2_scale_ptrs": [0]}, ValueError, r"w2_scale_ptrs\[0\] is 0"),
    "negative": ({"w2_weight_ptrs": [-8]}, ValueError, r"w2_weight_ptrs\[0\] is -8"),
    "one address": ({"w2_weight_ptrs": 64}, TypeError, "w2_weight_ptrs must be a list"),
    "text": ({"w2_weight_ptrs": ["a"]}, TypeError, "a pointer in w2_weight_ptrs must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_writes_nothing(name: str) -> None:
    change, error, message = BAD[name]
    w = loaded(gpu_experts_mask=torch.arange(E) == 1)
    buffers = HostBuffers(DENSE_FORMATS["MXFP4"], 1)
    given = {"ranks": 1, "expert": 0, **dict(zip(NAMES, buffers.pointers, strict=True)), **change}
    with pytest.raises(error, match=message):
        w.submit_write_weight_scale_to_buffer(*given.values())
    w.sync_write_weight_scale_to_buffer()
    assert all((memory[0] == 0xA5).all() for memory in buffers.memory.values())


def test_needs_weights() -> None:
    w = wrapper()
    pointers = HostBuffers(DENSE_FORMATS["MXFP4"], 1).pointers
    with pytest.raises(RuntimeError, match="no weights: call load_weights"):
        w.submit_write_weight_scale_to_buffer(1, 0, *pointers)
    with pytest.raises(RuntimeError, match="no weights: call load_weights"):
        w.sync_write_weight_scale_to_buffer()
