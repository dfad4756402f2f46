"""Linear layers and embeddings as operators: one node in every kind of graph, with their bits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hybrid_moe.integrations.transformers.dense.embedding import HybridEmbedding
from hybrid_moe.integrations.transformers.dense.hybrid_linear import share_inputs
from hybrid_moe.runtime import dense_op, torch_op
from tests.hybrid_moe.integrations.dense.linear_cases import Case, K, N, inputs

LINEAR = torch.ops.hybrid_moe.linear.default
EMBEDDING = torch.ops.hybrid_moe.embedding.default


@dataclass
class Node:
    """A module, its operator, and inputs of some tokens."""

    module: torch.nn.Module
    target: torch._ops.OpOverload
    batch: Callable[[int], torch.Tensor]

    def around(self, x: torch.Tensor) -> torch.Tensor:
        """Operations on both sides, which round nothing."""
        y: torch.Tensor = self.module(x + 0) * 0.5
        return y

    def count(self, graph: torch.fx.Graph) -> int:
        return sum(node.target is self.target for node in graph.nodes)


def _linear() -> Node:
    return Node(Case.random(bias=True).layer, LINEAR, lambda tokens: inputs(tokens, K, seed=tokens))


def _embedding() -> Node:
    module = HybridEmbedding(Case.random().layer, "embed")
    return Node(module, EMBEDDING, lambda tokens: torch.arange(tokens) * 7 % N)


@pytest.fixture(params=[_linear, _embedding])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    torch._dynamo.reset()
    yield request.param()
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_into_one_graph(node: Node, backend: str) -> None:
    """Inductor without operations around it: they would be C++, which takes long to compile."""
    function = node.around if backend == "aot_eager" else node.module
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for tokens in (3, 1, 7, 40):  # the second shape makes sizes symbols
        x = node.batch(tokens)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_one_node(node: Node, mode: str, pre_dispatch: bool) -> None:
    x = node.batch(5)
    graph = make_fx(lambda x: node.around(x), tracing_mode=mode, pre_dispatch=pre_dispatch)(x)
    assert node.count(graph.graph) == 1
    assert torch.equal(graph(x), node.around(x))


def test_jit_trace_records_the_node(node: Node) -> None:
    """Without it the trace would hold the first output as a constant."""
    traced = torch.jit.trace(node.around, (node.batch(5),))
    for tokens in (5, 3):
        assert torch.equal(traced(node.batch(tokens)), node.around(node.batch(tokens)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_one_node(node: Node, strict: bool) -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = node.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return node.around(x)

    shapes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    program = torch.export.export(Around(), (node.batch(5),), dynamic_shapes=shapes, strict=strict)
    assert node.count(program.graph) == 1
    for tokens in (5, 40):
        x = node.batch(tokens)
        assert torch.equal(program.module()(x), node.around(x))


def test_opcheck() -> None:
    linear, embedding = _linear(), _embedding()
    for tokens in (1, 5):
        handle = linear.module._handle.value  # type: ignore[union-attr]
        torch.library.opcheck(LINEAR, (linear.batch(tokens), handle, N))
        handle = embedding.module._handle.value  # type: ignore[union-attr]
        torch.library.opcheck(EMBEDDING, (embedding.batch(tokens), handle, K, torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, K), (5, K), (2, 3, K), (K,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fake_is_like_the_real_output(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = Case.random().layer, torch.randn(shape).to(dtype)
    real = layer(x)
    with FakeTensorMode() as mode:
        fake = layer(mode.from_tensor(x))
    for attribute in ("shape", "dtype", "device"):
        assert getattr(fake, attribute) == getattr(real, attribute)
    assert fake.stride() == real.stride() or not x.numel()


def test_autocast_in_a_graph() -> None:
    layer, x = Case.random().layer, inputs(3, K, dtype=torch.float32)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = layer(x * 1)
            return y

    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, function(x))
    torch._dynamo.reset()


def test_a_gradient_in_a_graph_is_refused_when_it_is_computed() -> None:
    node = _linear()
    compiled = torch.compile(node.around, fullgraph=True, backend="aot_eager")
    x = node.batch(3).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, node.around(x)) and y.requires_grad
    with pytest.raises(RuntimeError, match="no gradient: inference only"):
        y.sum().backward()
    torch._dynamo.reset()


def test_transforms_of_torch_func(node: Node) -> None:
    """Their tensors have no address, or one that is zero."""
    x = torch.stack([node.batch(4), node.batch(4).flip(0)])
    want = node.module(x)
    assert torch.equal(torch.vmap(node.module)(x), want)
    assert torch.equal(torch.vmap(node.module, in_dims=1)(x), want.movedim(1, 0))
    assert torch.equal(torch.func.functionalize(node.module)(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_derivatives_are_refused_by_name(dtype: torch.dtype) -> None:
    layer, x = Case.random().layer, inputs(2, K, dtype=dtype)
    message = "q_proj: .* no gradient: inference only"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(layer, (x,), (x,))
    with forward_ad.dual_level():
        assert torch.equal(layer(x * 1), layer(x))
        with pytest.raises(RuntimeError, match=message):
            layer(forward_ad.make_dual(x, x))


def test_layers_in_the_same_code_stay_themselves() -> None:
    one, other = Case.random().layer, Case.random(seed=1).layer
    twin = copy.deepcopy(one)
    twin.load_state_dict({"weight": other.weight.clone()})
    compiled = torch.compile(lambda f, x: f(x) * 2, fullgraph=True, backend="aot_eager")
    for layer in (one, other, twin, one):
        assert torch.equal(compiled(layer, inputs(2, K)), layer(inputs(2, K)) * 2)
    torch._dynamo.reset()


def test_a_graph_does_not_share_inputs() -> None:
    """Each layer is a node of its own there, whatever was learned."""
    parent = torch.nn.ModuleList([Case.random(seed=s).layer for s in range(3)])
    share_inputs(parent)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in parent]

    want = [function(inputs(1, K, seed=s)) for s in range(4)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        got = compiled(inputs(1, K, seed=seed))
        assert all(map(torch.equal, got, want[seed]))
    graph = make_fx(function)(inputs(1, K))
    assert sum(node.target is LINEAR for node in graph.graph.nodes) == 3
    torch._dynamo.reset()


def test_a_graph_keeps_no_layer_alive() -> None:
    node = _linear()
    handle = node.module._handle.value  # type: ignore[union-attr]
    graph = make_fx(node.module)(node.batch(2))
    node.module = torch.nn.Identity()
    gc.collect()
    assert handle not in torch_op._layers
    with pytest.raises(RuntimeError, match=rf"handle {handle} in this process"):
        graph(node.batch(2))
    with pytest.raises(RuntimeError, match="in this process"):
        dense_op.linear(node.batch(2), handle, N)
