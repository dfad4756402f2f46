"""`weight` and `bias`: free to look at, unpacked to read, never written."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.held import HeldMatrix
from hybrid_moe.integrations.transformers.dense.hybrid_linear import share_inputs
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight
from tests.hybrid_moe.integrations.dense.linear_cases import WHERE, Case, K, N, inputs

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
IDS = torch.tensor([[0, N - 1, 5], [5, 64, 63]])


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were unpacked, by call."""
    calls: list[int] = []
    unpack, take_rows = PackedMatrix.unpack, PackedMatrix.take_rows

    def whole(self: PackedMatrix, *args: Any) -> Any:
        calls.append(self.rows)
        return unpack(self, *args)

    def some(self: PackedMatrix, ids: Any) -> Any:
        calls.append(len(ids))
        return take_rows(self, ids)

    monkeypatch.setattr(PackedMatrix, "unpack", whole)
    monkeypatch.setattr(PackedMatrix, "take_rows", some)
    return calls


FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda w: (w.shape, w.size(), w.size(0), len(w), w.dim()),
    "dtype": lambda w: (w.dtype, w.is_floating_point(), w.element_size(), w.type()),
    "device": lambda w: (w.device, w.is_cpu, w.is_meta, w.is_cuda),
    "sizes": lambda w: (w.numel(), w.nbytes, w.stride(), w.storage_offset()),
    "layout": lambda w: (w.layout, w.is_contiguous(), w.is_pinned(), w.is_shared()),
    "gradient": lambda w: (w.requires_grad, w.grad, w.is_leaf),
    "same dtype": lambda w: (w.to(w.dtype) is w, w.to("cpu") is w, w.cpu() is w),
    "contiguous": lambda w: w.contiguous() is w,
    "another of its kind": lambda w: (
        torch.empty_like(w).shape, torch.zeros_like(w, dtype=torch.float32),
        w.new_zeros(3), w.new_empty(2, 2).shape, torch.ones_like(w, device="meta").device,
    ),
    "views": lambda w: (w.t().shape, w.data.shape, w.view(-1).shape, w[3:9].shape, w.T.stride()),
    "chunks": lambda w: [part.shape for part in w.chunk(2)],
}  # fmt: skip


@pytest.mark.parametrize("what", FREE)
def test_what_is_free(what: str, unpacked: list[int]) -> None:
    """The same answers as those of a plain parameter, without unpacking."""
    case = Case.random()
    plain = torch.nn.Parameter(case.weight.bfloat16(), requires_grad=False)
    want, got = FREE[what](plain), FREE[what](case.layer.weight)
    assert repr(got) == repr(want)
    assert not unpacked


def test_it_is_a_parameter() -> None:
    layer = Case.random(bias=True).layer
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    for tensor in layer.parameters():
        assert isinstance(tensor, PackedWeight) and isinstance(tensor, torch.nn.Parameter)
        assert tensor.whole and tensor.held is layer._held


READ: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "matmul": lambda w: inputs(2, K, dtype=w.dtype) @ w.T,
    "linear": lambda w: torch.nn.functional.linear(inputs(2, K, dtype=w.dtype), w),
    "transposed": lambda w: w.t() * 1,
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.float64),
    "half": lambda w: w.half(),
    "clone": lambda w: w.clone(),
    "detached clone": lambda w: w.data.detach().clone(),
    "sum": lambda w: w.float().sum(0),
    "abs": lambda w: w.abs(),
    "max": lambda w: w.max(),
    "comparison": lambda w: w == w,
    "cat": lambda w: torch.cat([w, w.float()]),
    "numpy": lambda w: torch.from_numpy(w.view(10, -1).float().numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w.float())),
    "einsum": lambda w: torch.einsum("tk,nk->tn", inputs(2, K, dtype=w.dtype), w),
    "bmm of heads": lambda w: torch.bmm(inputs(2, 3, K, dtype=w.dtype), w.view(2, -1, K).mT),
    "split": lambda w: w.split([N - 7, 7])[1] * 1,
    "columns": lambda w: w[:, 1:5] + 0,
    "element": lambda w: w[3, 4] + 0,
    "mask": lambda w: w[w > 0],
    "reshape": lambda w: w.reshape(-1, 2) + 0,
    "where": lambda w: w.where(w > 0, torch.zeros((), dtype=w.dtype)),
    "copied from": lambda w: torch.empty(N, K).copy_(w),
    "norm": lambda w: torch.linalg.vector_norm(w.float()),
}


@Formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inference", [False, True])
def test_reading_unpacks(fmt: WeightFormat, dtype: torch.dtype, inference: bool) -> None:
    """Stored bits, or dequantised values; as if a plain tensor were read."""
    case = Case.random(fmt, dtype=dtype)
    plain = case.weight.float().to(dtype)
    with torch.inference_mode(inference):
        for name, read in READ.items():
            got, want = read(case.layer.weight), read(plain)
            assert type(got) is torch.Tensor or got is case.layer.weight, name
            assert torch.equal(got, want) and got.dtype == want.dtype, name


def test_printing_shows_values() -> None:
    case = Case.random(rows=64, inputs=32)
    plain = str(case.weight.bfloat16())
    for text in (repr(case.layer.weight), f"{case.layer.weight}"):
        assert plain in text and text.startswith("PackedWeight(") and "BF16" in text


def test_a_bias_reads_as_one() -> None:
    case = Case.random(bias=True, dtype=torch.float32)
    bias = case.layer.bias
    assert bias is not None and case.bias is not None
    assert torch.equal(bias + 0, case.bias) and torch.equal(bias[3] + 0, case.bias[3])
    assert torch.equal(bias.float(), case.bias)


ROWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "one": (lambda w: w[5] + 0, 1),
    "last": (lambda w: w[-1] + 0, 1),
    "slice": (lambda w: w[60:70] + 0, 10),
    "steps": (lambda w: w[1:40:7] + 0, 6),
    "ids": (lambda w: w[IDS], 6),
    "list": (lambda w: w[[3, -1]], 2),
    "int32": (lambda w: w[IDS.int()], 6),
    "mask": (lambda w: w[torch.arange(N) < 4], 4),
    "none": (lambda w: w[:0] + 0, 0),
    "index_select": (lambda w: w.index_select(0, IDS[0]), 3),
    "embedding": (lambda w: torch.nn.functional.embedding(IDS, w), 6),
    "part of rows": (lambda w: w[8:10, 3] + 0, 2),
    "narrow": (lambda w: w.narrow(0, 7, 2) + 0, 2),
    "data": (lambda w: w.data[5].clone(), 1),
}


@Formats
@pytest.mark.parametrize("inference", [False, True])
def test_rows_are_unpacked_alone(
    fmt: WeightFormat, inference: bool, unpacked: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    case = Case.random(fmt, where=f"rows.{fmt.name}.{inference}")
    plain = case.weight.bfloat16()
    with torch.inference_mode(inference):
        for name, (read, rows) in ROWS.items():
            unpacked.clear()
            assert torch.equal(read(case.layer.weight), read(plain)), name
            assert unpacked == [rows], name
    assert not caplog.records


@pytest.mark.parametrize("ids", [torch.tensor([N]), torch.tensor([-N - 1])])
def test_rows_that_are_not_there(ids: torch.Tensor) -> None:
    weight = Case.random().layer.weight
    with pytest.raises(IndexError):
        weight[ids]
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(ids, weight)
    with pytest.raises(IndexError):
        weight[int(ids)]


def test_reading_before_loading_is_named() -> None:
    held = HeldMatrix(PackedMatrix(BF16, N, K, PoolConfig(1)), WHERE, torch.bfloat16)
    for read in (held.weight, lambda: held.rows(np.zeros(1, np.int64))):
        with pytest.raises(RuntimeError, match=f"{WHERE}: read before its weights are loaded"):
            read()


def test_what_reading_costs_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    case = Case.random(where="a.module.of.this.test")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            case.layer.weight.float()
    (record,) = caplog.records
    assert "a.module.of.this.test" in record.message and "37.5 KiB" in record.message


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda w: setattr(w, "data", torch.zeros(N, K)),
    "data +=": lambda w: w.data.add_(1),
    "data copy_": lambda w: w.data.copy_(torch.zeros(N, K)),
    "copy_": lambda w: w.copy_(torch.zeros(N, K)),
    "zero_": lambda w: w.zero_(),
    "+=": lambda w: w.__iadd__(1),
    "normal_": lambda w: torch.nn.init.normal_(w),
    "xavier": lambda w: torch.nn.init.xavier_uniform_(w),
    "item": lambda w: w.__setitem__(3, 0.0),
    "slice": lambda w: w.__setitem__(slice(3, 5), 0.0),
    "element": lambda w: w.__setitem__((3, 4), 0.0),
    "ids": lambda w: w.__setitem__(IDS, 0.0),
    "a row": lambda w: w[3].zero_(),
    "rows": lambda w: w[3:9].mul_(2),
    "a view": lambda w: w.view(-1).zero_(),
    "a view of a view": lambda w: w.t()[4].fill_(1),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "index_add_": lambda w: w.index_add_(0, IDS[0], torch.ones(3, K, dtype=w.dtype)),
    "out=": lambda w: torch.mm(torch.ones(N, 2).bfloat16(), torch.ones(2, K).bfloat16(), out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(N, K, dtype=w.dtype)),
    "share_memory_": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused_by_name(write: str, inference: bool) -> None:
    layer, x = Case.random().layer, inputs(2, K)
    y = layer(x)
    with (
        torch.inference_mode(inference),
        pytest.raises(RuntimeError, match=rf"{WHERE}.weight is packed.*load_state_dict takes"),
    ):
        WRITES[write](layer.weight)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("access", ["data_ptr", "storage", "typed_storage"])
def test_it_has_no_address(access: str) -> None:
    weight = Case.random().layer.weight
    with pytest.raises(RuntimeError, match=rf"{WHERE}.weight is packed.*clone\(\)"):
        getattr(weight, access)()
    with pytest.raises(RuntimeError, match="data"):
        weight.untyped_storage().data_ptr()


def test_training_it_is_refused_by_name() -> None:
    layer = Case.random().layer
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"{WHERE}.weight.*inference only"):
        layer.requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{WHERE}.weight.*inference only"):
        layer.weight.requires_grad = True
    assert not layer.weight.requires_grad


def test_gradients_flow_through_what_was_read() -> None:
    """An unpacked weight is a constant like any other."""
    case, x = Case.random(dtype=torch.float32), torch.randn(2, K, requires_grad=True)
    (x @ case.layer.weight.T).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, case.weight.float().sum(0).expand(2, K))


CONVERSIONS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float16),
    "to meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "type": lambda m: m.type(torch.float32),
}


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_conversions_are_refused_by_name(convert: str) -> None:
    layer, x = Case.random(bias=True).layer, inputs(2, K)
    y = layer(x)
    with pytest.raises(RuntimeError, match=rf"{WHERE} is packed.*it cannot be converted, moved"):
        CONVERSIONS[convert](torch.nn.Sequential(layer))
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conversions_that_change_nothing_pass(dtype: torch.dtype, unpacked: list[int]) -> None:
    layer = Case.random(bias=True, dtype=dtype).layer
    weight = layer.weight
    model = torch.nn.Sequential(layer)
    model.to("cpu").to(dtype).cpu().to(torch.device("cpu"), dtype)
    model.bfloat16() if dtype is torch.bfloat16 else model.float()
    model.eval().train().requires_grad_(False).zero_grad()
    assert layer.weight is weight and not unpacked


def _tie(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(torch.zeros(N, K))


def _old_weight_norm(layer: Any) -> None:
    torch.nn.utils.weight_norm(layer)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight =": _tie,
    "weight = None": lambda m: setattr(m, "weight", None),
    "bias =": lambda m: setattr(m, "bias", torch.nn.Parameter(torch.zeros(N))),
    "del": lambda m: delattr(m, "weight"),
    "register": lambda m: m.register_parameter("weight", torch.nn.Parameter(torch.zeros(N, K))),
    "reset": lambda m: m.reset_parameters(),
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", torch.nn.Identity()),
    "unsafe": lambda m: parametrize.register_parametrization(
        m, "bias", torch.nn.Identity(), unsafe=True
    ),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "functional_call": lambda m: torch.func.functional_call(
        m, {"weight": torch.zeros(N, K)}, (inputs(2, K),)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_stay_what_they_are(change: str) -> None:
    layer, x = Case.random(bias=True).layer, inputs(2, K)
    weight, y = layer.weight, layer(x)
    with pytest.raises(RuntimeError, match=rf"{WHERE}.* packed by hybrid_moe"):
        CHANGES[change](layer)
    assert layer.weight is weight and list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), y)


def test_setting_the_same_parameter_passes() -> None:
    """What tie_weights does for modules that are tied already."""
    layer = Case.random(bias=True).layer
    layer.weight = layer.weight
    layer.bias = layer.bias
    layer.training = False
    layer.note = "modules may carry notes"  # type: ignore[assignment]
    torch.func.functional_call(layer, dict(layer.named_parameters()), (inputs(2, K),))


def test_copies_share_the_strips() -> None:
    layer = Case.random(bias=True).layer
    for name, tensor in layer.named_parameters():
        twin = copy.deepcopy(tensor)
        assert isinstance(twin, PackedWeight) and isinstance(twin, torch.nn.Parameter)
        assert twin.held.matrix is layer.matrix and twin.shape == getattr(layer, name).shape
        assert torch.equal(twin + 0, tensor + 0)


# state_dict and load_state_dict


def test_state_dict_has_the_packed_tensors(unpacked: list[int]) -> None:
    layer = Case.random(bias=True).layer
    state = layer.state_dict()
    for name in ("weight", "bias"):
        assert isinstance(state[name], PackedWeight) and state[name].whole
        assert state[name].held is layer._held
    assert not unpacked


@Formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_load_state_dict_packs(fmt: WeightFormat, dtype: torch.dtype, bias: bool) -> None:
    case, other = Case.random(fmt, bias=bias), Case.random(fmt, bias=bias, seed=1)
    state = {"weight": other.weight.to(dtype)}
    if other.bias is not None:
        state["bias"] = other.bias
    layer, weight = case.layer, case.layer.weight
    before = layer.matrix
    layer.load_state_dict(state)
    assert layer.matrix is not before and layer.weight is weight
    codes, scales = fmt.encode(state["weight"].float().numpy())
    again = layer.matrix.unpack()
    assert np.array_equal(again.codes, codes)
    assert scales is None or np.array_equal(again.scales, scales)
    if fmt is BF16:  # what was BF16 before is the same bits
        assert torch.equal(layer(inputs(3, K)), other.layer(inputs(3, K)))
    if other.bias is not None:
        assert torch.equal(layer.bias + 0, other.bias.bfloat16())


@Formats
def test_loading_packed_weights_shares_them(fmt: WeightFormat, unpacked: list[int]) -> None:
    """Nothing is rounded, and nothing copied."""
    case, other = Case.random(fmt, bias=True), Case.random(fmt, bias=True, seed=1)
    case.layer.load_state_dict(other.layer.state_dict())
    assert case.layer.matrix is other.layer.matrix and not unpacked
    assert torch.equal(case.layer(inputs(3, K)), other.layer(inputs(3, K)))


def test_loading_packed_weights_of_another_kind_unpacks_them() -> None:
    for options in ({"fmt": MXFP4}, {"threads": 2}, {"dtype": torch.float32}):
        case = Case.random(bias=True)
        other = Case.random(**{"bias": True, "seed": 1, **options})  # type: ignore[arg-type]
        case.layer.load_state_dict(other.layer.state_dict())
        assert torch.equal(case.layer.weight + 0, other.weight.bfloat16())
    with pytest.raises(RuntimeError, match=r"expected \(200, 96\)"):
        case.layer.load_state_dict({"weight": case.layer.bias, "bias": case.layer.bias})


def test_loading_its_own_state_changes_nothing(unpacked: list[int]) -> None:
    layer = Case.random(bias=True).layer
    matrix = layer.matrix
    layer.load_state_dict(layer.state_dict())
    assert layer.matrix is matrix and not unpacked


def test_loading_half_of_it() -> None:
    case, other = Case.random(bias=True), Case.random(bias=True, seed=1)
    assert other.bias is not None
    layer = case.layer
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        layer.load_state_dict({"weight": other.weight})
    layer.load_state_dict({"bias": other.bias}, strict=False)
    assert torch.equal(layer.weight + 0, other.weight.bfloat16())  # as torch: loaded nevertheless
    assert torch.equal(layer.bias + 0, other.bias.bfloat16())


BAD: dict[str, tuple[WeightFormat, Any, str]] = {
    "shape": (BF16, torch.zeros(N, K + 32), rf"shape \({N}, {K + 32}\), expected \({N}, {K}\)"),
    "int": (BF16, torch.zeros(N, K, dtype=torch.int8), "float tensor with values"),
    "meta": (BF16, torch.zeros(N, K, device="meta"), "float tensor with values"),
    "NaN": (MXFP4, torch.full((N, K), torch.nan), "NaN or infinite, which MXFP4 cannot hold"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_loaded_is_named_and_leaves_the_old(kind: str) -> None:
    fmt, weight, message = BAD[kind]
    layer, x = Case.random(fmt).layer, inputs(3, K)
    y = layer(x)
    with pytest.raises(RuntimeError, match=rf"{WHERE}: .*{message}"):
        layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(x), y)


def test_the_first_weights_are_whole() -> None:
    case = Case.random(bias=True)
    held = HeldMatrix(PackedMatrix(BF16, N, K, PoolConfig(1), bias=True), WHERE, torch.bfloat16)
    for half in ((case.weight, None), (None, case.bias)):
        with pytest.raises(ValueError, match=f"{WHERE}: the first weights must be whole"):
            held.load(*half)
    held.load(case.weight, case.bias)
    assert torch.equal(held.weight(), case.weight.bfloat16())
    with pytest.raises(ValueError, match=f"{WHERE}: a bias was given"):
        Case.random().layer._held.load(case.weight, case.bias)


def test_memory_is_freed_without_the_collector() -> None:
    """Strips are gigabytes: no cycle may keep them until the collector runs."""
    parent = torch.nn.ModuleList([Case.random(bias=True, seed=s).layer for s in range(3)])
    share_inputs(parent)
    for seed in range(4):
        for layer in parent:
            layer(inputs(1, K, seed=seed))
    matrices = [weakref.ref(layer.matrix) for layer in parent]
    gc.disable()
    try:
        del parent, layer
        assert [matrix() for matrix in matrices] == [None] * 3
    finally:
        gc.enable()


def test_unexpected_keys_are_named() -> None:
    layer = Case.random().layer
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        layer.load_state_dict({"weight": torch.zeros(N, K), "bias": torch.zeros(N)})


def test_a_job_under_way_keeps_the_matrix_it_has() -> None:
    case, other = Case.random(), Case.random(seed=1)
    x = inputs(1, K)
    old, new = case.layer(x), other.layer(x)
    layer: HeldMatrix = case.layer._held
    out = torch.empty(1, N, dtype=torch.bfloat16)
    job = layer.open().start(1, x.data_ptr(), out.data_ptr(), out, x)
    case.layer.load_state_dict({"weight": other.weight})
    assert torch.equal(job.wait(), old)
    assert torch.equal(case.layer(x), new)
