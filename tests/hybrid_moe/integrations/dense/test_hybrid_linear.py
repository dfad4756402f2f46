"""HybridLinear: the module, for every kind of input and in every mode of torch."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from tests.hybrid_moe.integrations.dense.linear_cases import WHERE, Case, K, N, inputs
from tests.reference import assert_within

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)


@Formats
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(K,), (1, 1, K), (3, K), (2, 5, K), (2, 2, 9, K)])
def test_outputs_are_within_the_contract(
    fmt: WeightFormat, bias: bool, shape: tuple[int, ...]
) -> None:
    case = Case.random(fmt, bias=bias)
    x = inputs(*shape)
    y = case.layer(x)
    assert y.shape == (*shape[:-1], N) and y.dtype == torch.bfloat16 and y.is_contiguous()
    assert_within(y.double().numpy().reshape(-1, N), case.expected(x))


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    y = Case.random().layer(inputs(*shape))
    assert y.shape == (*shape[:-1], N) and y.dtype == torch.bfloat16


def test_more_tokens_than_one_job_has() -> None:
    layer = Case.random().layer
    x = inputs(2100, K)
    assert torch.equal(layer(x)[-3:], layer(x[-3:]))


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_are_rounded_to_bf16(dtype: torch.dtype) -> None:
    layer = Case.random().layer
    x = torch.randn(4, K, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.bfloat16()).to(dtype))


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "within a larger one": lambda x: torch.cat([x, x], 1)[:, :K],
    "expanded": lambda x: x[:1].expand(len(x), K),
    "negated view": lambda x: torch._neg_view(x),
    "an odd address": lambda x: torch.cat([x[0, :1], x.flatten()])[1:].view_as(x),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("kind", ODD)
def test_any_layout(kind: str) -> None:
    layer = Case.random().layer
    x = ODD[kind](inputs(5, K))
    plain = torch.empty(5, K, dtype=torch.bfloat16).copy_(x)
    assert torch.equal(layer(x), layer(plain))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": nullcontext,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modes(mode: str, dtype: torch.dtype) -> None:
    layer = Case.random().layer
    x = inputs(3, K, dtype=dtype)
    want = layer(x)
    with MODES[mode]():
        y = layer(x)
        assert y.is_inference() == torch.is_inference_mode_enabled()
    assert torch.equal(y, want) and not y.requires_grad


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_torch_gives(given: torch.dtype, wanted: torch.dtype) -> None:
    layer, x = Case.random(dtype=torch.float32).layer, inputs(3, K, dtype=given)
    plain = torch.nn.Linear(K, N, bias=False, dtype=torch.float32)
    want = layer(x.to(torch.bfloat16))
    with torch.autocast("cpu", dtype=wanted):
        y = layer(x)
        if given != torch.float64:  # which autocast leaves alone
            assert y.dtype == plain(x).dtype == wanted
    assert torch.equal(y, want.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_is_refused_by_name_and_only_then(dtype: torch.dtype) -> None:
    layer = Case.random().layer
    x = inputs(3, K, dtype=dtype)
    want = layer(x)
    y = layer(x.requires_grad_())
    assert torch.equal(y, want) and y.requires_grad
    with pytest.raises(RuntimeError, match=rf"{WHERE}: .* no gradient: inference only"):
        y.sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_threads_share_a_layer() -> None:
    layer = Case.random(threads=2).layer
    batches = [inputs(t, K, seed=t) for t in (1, 2, 3, 17)]
    want = [layer(x) for x in batches]

    def run(turn: int) -> bool:
        x, y = batches[turn % 4], want[turn % 4]
        return torch.equal(layer(x), y)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(200)))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "size": (lambda: torch.zeros(3, K + 32), ValueError, rf"shape \(3, {K + 32}\), expected"),
    "bf16 size": (lambda: torch.zeros(2, dtype=torch.bfloat16), ValueError, "expected"),
    "scalar": (lambda: torch.tensor(1.0), ValueError, "expected"),
    "int": (lambda: torch.zeros(3, K, dtype=torch.int64), TypeError, "not torch.int64"),
    "complex": (lambda: torch.zeros(3, K, dtype=torch.complex64), TypeError, "float tensor"),
    "sparse": (lambda: torch.eye(K).to_sparse(), TypeError, "dense"),
    "sparse rows": (lambda: torch.eye(K).bfloat16().to_sparse_csr(), TypeError, "dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, K)]), TypeError, "dense"),
    "None": (lambda: None, TypeError, "must be a tensor"),
    "list": (lambda: [[1.0] * K], TypeError, "must be a tensor"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_inputs_are_named(kind: str) -> None:
    make, error, message = WRONG[kind]
    with pytest.raises(error, match=rf"{WHERE}: .*{message}"):
        Case.random().layer(make())


def test_meta_tensors_have_meta_outputs() -> None:
    y = Case.random().layer(torch.empty(2, 3, K, device="meta"))
    assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.float32


def test_before_loading() -> None:
    """A model is built around empty matrices, which loaders fill."""
    case = Case.random(bias=True)
    matrix = PackedMatrix(BF16, N, K, PoolConfig(1), bias=True)
    layer = HybridLinear(matrix, WHERE, torch.bfloat16)
    assert not layer.state_dict() and layer.weight.shape == (N, K)
    for x in (inputs(1, K), inputs(2, K).float()):
        with pytest.raises(RuntimeError, match=f"{WHERE}: forward before its weights are loaded"):
            layer(x)
    matrix.load(case.matrix)
    assert torch.equal(layer(inputs(2, K)), case.layer(inputs(2, K)))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_it_is_a_linear_layer() -> None:
    layer = Case.random(bias=True).layer
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert repr(layer) == f"HybridLinear(in_features={K}, out_features={N}, bias=True, BF16)"
    assert Case.random().layer.bias is None


def test_hooks() -> None:
    layer, x = Case.random().layer, inputs(2, K)
    plain, doubled = layer(x), layer(x * 2)
    pre = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert torch.equal(layer(x), doubled)
    post = layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(layer(x), doubled + 1)
    pre.remove()
    post.remove()
    assert torch.equal(layer(x), plain)


def test_outputs_are_the_caller_s_own() -> None:
    layer, x = Case.random().layer, inputs(1, K)
    first = layer(x)
    kept = first.clone()
    second = layer(x * 2)
    second.zero_()
    assert torch.equal(first, kept)
    x.zero_()
    assert torch.equal(first, kept)


def test_a_copy_shares_the_strips() -> None:
    case = Case.random(bias=True)
    model = torch.nn.ModuleDict({"a": case.layer, "b": torch.nn.Linear(K, K)}).eval()
    twin = copy.deepcopy(model)
    layer: Any = twin["a"]
    assert layer is not case.layer and layer.matrix is case.layer.matrix
    assert layer.weight is not case.layer.weight and layer._handle is not case.layer._handle
    assert not layer.training
    assert torch.equal(layer(inputs(2, K)), case.layer(inputs(2, K)))
    layer.load_state_dict({"weight": torch.zeros(N, K), "bias": torch.zeros(N)})
    assert not layer(inputs(2, K)).any() and case.layer(inputs(2, K)).any()


def test_pickling_is_refused_by_name() -> None:
    layer = Case.random().layer
    for what in (layer, layer.weight, layer.state_dict()):
        with pytest.raises(TypeError, match=rf"{WHERE}.*cannot be pickled.*save_pretrained"):
            pickle.dumps(what)


def test_a_forked_child_is_told_so() -> None:
    layer, x = Case.random().layer, inputs(1, K)
    layer(x)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        for use in (lambda: layer(x), lambda: layer.weight[3] + 0, lambda: layer.weight.clone()):
            try:
                use()
            except RuntimeError as error:
                sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    messages = [receiver.recv() for _ in range(3)]
    process.join(10)
    assert all("forked child process" in message for message in messages)
    assert process.exitcode == 0


def test_a_weight_that_is_packed_for_other_threads_is_packed_anew() -> None:
    """Strips are cut over the pools that compute with them."""
    one, other = Case.random(), Case.random(seed=1)
    pool = PoolConfig(1, 1, (min(numa_nodes()),))
    packed = PackedMatrix(BF16, N, K, pool)
    packed.load(other.matrix)
    layer = HybridLinear(packed, WHERE, torch.bfloat16)
    one.layer.load_state_dict(layer.state_dict())
    assert one.layer.matrix is not packed and one.layer.matrix.pool == PoolConfig(1) != pool
    assert torch.equal(one.layer(inputs(2, K)), other.layer(inputs(2, K)))
