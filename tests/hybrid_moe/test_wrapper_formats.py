"""The wrapper with every weight format that a checkpoint stores: loaded, run on the real kernels
against float64 weights, given as tensors, and written for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.cpu_kernels.kernels.format_kernels import sums_integers
from hybrid_moe.formats.table import FORMATS, METHODS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.wrapper import KTMoEWrapper
from tests.reference import FIXED_POINT_ERROR, Evaluation, assert_within, evaluate
from tests.stored_kinds import FILE, KINDS, Kind, Stored, write

E, TOP_K = 2, 2
FIRST: dict[str, str] = {}
for _name, _kind in KINDS.items():
    FIRST.setdefault(_kind.format, _name)
BRIEF = ("NVFP4", "MXFP8", "FP8", "FP8_PERCHANNEL", "INT4_G32_BF16", "INT4_G64_FP16_Z1",
         "INT4_G128_FP16_Z0", "INT8_ROW_FLOAT32")  # fmt: skip
"""Formats whose kernels a short run compiles; the others differ in a group or a type of scale."""
RUN = [
    pytest.param(name, marks=[] if fmt in BRIEF else pytest.mark.full)
    for fmt, name in FIRST.items()
]
WITH_TENSORS = [
    name
    for fmt, name in FIRST.items()
    if {p.name for p in FORMATS[fmt].planes} == {"codes", "scales"} and FORMATS[fmt].scale
]


@pytest.fixture(autouse=True)
def _forget_checkpoints() -> Iterator[None]:
    yield
    KTMoEWrapper.force_release_loader()


def wrapper_of(kind: Kind, **arguments: Any) -> KTMoEWrapper:
    sizes = {
        "layer_idx": 0, "num_experts": E, "num_experts_per_tok": TOP_K,
        "hidden_size": kind.hidden, "moe_intermediate_size": kind.intermediate,
        "cpuinfer_threads": 1, "threadpool_count": 1,
    }  # fmt: skip
    return KTMoEWrapper(**{**sizes, **arguments})


def batch_of(kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(5, kind.hidden, generator=rng).to(torch.bfloat16)
    ids = torch.tensor([[0, 1], [1, 0], [0, -1], [1, -1], [0, 1]])
    return x, ids, torch.rand(5, 2, generator=rng) + 0.1


def expected(kind: Kind, weights: Stored, batch: tuple[torch.Tensor, ...]) -> Evaluation:
    error = FIXED_POINT_ERROR if sums_integers(FORMATS[kind.format]) else 0.0
    x, ids, routing = batch
    return evaluate(
        x.double().numpy(), ids.numpy(), routing.numpy(),
        weights.gate, weights.up, weights.down, activation_error=error,
    )  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_load_and_run(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    weights, batch = write(tmp_path, kind), batch_of(kind)
    for method in (kind.method, "auto"):
        w = wrapper_of(kind, weight_path=tmp_path, method=method)
        assert w.formats == (FORMATS[kind.format],) * 2
        assert w.method == (kind.format if method == "auto" else kind.method)
        w.load_weights()
        assert_within(w.forward(*batch).double().numpy(), expected(kind, weights, batch))
        w.close()


@pytest.mark.parametrize("name", KINDS)
def test_wrong_pairings_name_the_right_ones(name: str, tmp_path: Path) -> None:
    """Whatever method is asked for, the wrapper has formats that it stands for, or says which
    methods there are."""
    kind = KINDS[name]
    write(tmp_path, kind)
    for method in METHODS.values():
        w = None
        try:
            w = wrapper_of(kind, weight_path=tmp_path, method=method.name)
            w.checkpoint_source()
        except ValueError as error:
            refused = str(error)
            assert method.format_for(FORMATS[kind.format]) is None or "multiple of" in refused
            if "multiple of" not in refused:
                assert f"{kind.format}, which does not become {method.name}: use " in refused
                assert '"auto"' in refused and str(tmp_path) in refused
        else:
            assert w is not None and set(w.formats) <= {*method.formats, method.made}


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_tensors_of_codes(name: str, tmp_path: Path) -> None:
    """Codes and scales as torch has them give the experts that the checkpoint gives, bit for bit;
    and they are written to a GPU's buffers as they are."""
    kind = KINDS[name]
    fmt = FORMATS[kind.format]
    write(tmp_path, kind)
    read = wrapper_of(kind, weight_path=tmp_path, method="auto").checkpoint_source()
    experts = [read.expert(expert) for expert in range(E)]
    codes_as = {"e4m3": torch.float8_e4m3fn}.get(fmt.code.name)
    scales_as = {"ue8m0": torch.float8_e8m0fnu, "bf16": torch.bfloat16}.get(fmt.scale.name)  # type: ignore[union-attr]
    given = {}
    for part in ("gate", "up", "down"):
        for plane, argument, dtype in (
            ("codes", "proj", codes_as), ("scales", "scale", scales_as),
        ):  # fmt: skip
            stacked = np.stack([getattr(getattr(e, part), plane) for e in experts])
            tensor = torch.from_numpy(stacked)
            given[f"{part}_{argument}"] = tensor if dtype is None else tensor.view(dtype)
    w = wrapper_of(kind, method="auto", formats=read.formats)
    w.load_weights_from_tensors(**given)
    for expert, tensors in enumerate(experts):
        for part in ("gate", "up", "down"):
            planes = getattr(w.unpack(expert), part).planes
            for plane, values in getattr(tensors, part).planes.items():
                assert np.array_equal(planes[plane], values)
    w.close()


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.made is not None])
def test_tensors_of_floats(method: str) -> None:
    """They become what the method makes."""
    kind = KINDS["bf16"]
    made = METHODS[method].made
    assert made is not None
    rng = np.random.default_rng(0)
    weights = {
        f"{part}_proj": rng.standard_normal((E, *kind.shape(at))).astype(np.float32)
        for at, part in enumerate(("gate", "up", "down"))
    }
    w = wrapper_of(kind, method=method)
    w.load_weights_from_tensors(**{k: torch.from_numpy(v) for k, v in weights.items()})
    tensors = w.unpack(1)
    for part in ("gate", "up", "down"):
        codes, scales = made.encode(weights[f"{part}_proj"][1])
        matrix = getattr(tensors, part)
        assert np.array_equal(matrix.codes, codes)
        assert scales is None or np.array_equal(matrix.scales, scales)
    w.close()


@pytest.mark.parametrize("name", ["fp8", "fp8 rows", "int4 32"])
def test_written_for_gpus(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    stored = write(tmp_path, kind)
    w = wrapper_of(kind, weight_path=stored.folder, method="auto")
    w.load_weights()
    tensors, fmt = w.unpack(1), FORMATS[kind.format]
    H, I = kind.hidden, kind.intermediate
    buffers = [
        np.zeros((2 * I, H * fmt.bits // 8), np.uint8),
        np.zeros(sum(getattr(tensors, p).scales.nbytes for p in ("gate", "up")), np.uint8),
        np.zeros((H, I * fmt.bits // 8), np.uint8),
        np.zeros(tensors.down.scales.nbytes, np.uint8),  # type: ignore[union-attr]
    ]
    w.submit_write_weight_scale_to_buffer(1, 1, *([b.ctypes.data] for b in buffers))
    w.sync_write_weight_scale_to_buffer()
    for at, parts in ((0, ("gate", "up")), (2, ("down",))):
        for more, plane in ((0, "codes"), (1, "scales")):
            arrays = [np.ascontiguousarray(getattr(getattr(tensors, p), plane)) for p in parts]
            whole = b"".join(array.tobytes() for array in arrays)
            assert buffers[at + more].tobytes() == whole
    w.close()


def test_not_written_for_gpus(tmp_path: Path) -> None:
    kind = KINDS["awq"]
    write(tmp_path, kind)
    w = wrapper_of(kind, weight_path=tmp_path, method="AWQ")
    w.load_weights()
    with pytest.raises(NotImplementedError, match=r"INT4_G128_FP16_Z0 are not written .* minima"):
        w.submit_write_weight_scale_to_buffer(1, 0, [1], [1], [1], [1])
    w.close()


@pytest.mark.parametrize("name", FIRST.values())
def test_a_damaged_checkpoint_and_its_repair(name: str, tmp_path: Path) -> None:
    """Nothing is loaded from a damaged one, and the whole one afterwards, by the same wrapper."""
    kind = KINDS[name]
    write(tmp_path, kind)
    file = tmp_path / FILE
    whole = file.read_bytes()
    w = wrapper_of(kind, weight_path=tmp_path, method="auto")
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        w.load_weights()
    assert not w.loaded and w.nbytes == 0
    file.write_bytes(whole)
    w.load_weights()
    assert w.loaded
    w.close()
