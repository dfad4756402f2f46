"""Layers as operators: one node in every kind of graph, and the layer's own bits out of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.registration import offload, register
from hybrid_moe.runtime import torch_op
from tests.hybrid_moe.cases import Weights, wrapper
from tests.hybrid_moe.tiny_models import build, logits, offload_experts, prompt

H, E, K = 64, 8, 3
TARGET = torch.ops.hybrid_moe.experts.default


@dataclass
class Entrance:
    """A layer of H = 64 behind one of the ways in.

    Attributes:
        layer: the object that owns the experts.
        call: (hidden [S, H], ids, weights) -> output.
    """

    layer: Any
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _offloaded() -> Entrance:
    model = offload(build("qwen3_moe"), "BF16", threads=1, progress=False)
    module = next(m for m in model.modules() if isinstance(m, HybridExperts))
    return Entrance(module, module)


def _named() -> Entrance:
    register()
    model = build("qwen3_moe")
    model.config.hybrid_moe_options = {"threads": 1}
    model.set_experts_implementation("hybrid_moe")
    module = model.get_submodule("model.layers.0.mlp.experts")
    return Entrance(module, module)


def _wrapper(**options: Any) -> Entrance:
    w = Weights.random().load(wrapper(method="BF16", cpuinfer_threads=1, **options))
    return Entrance(w, w.forward)


ENTRANCES = {"offloaded": _offloaded, "named": _named, "wrapper": _wrapper}


@pytest.fixture(params=ENTRANCES)
def entrance(request: pytest.FixtureRequest) -> Iterator[Entrance]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield ENTRANCES[request.param]()
    torch._dynamo.reset()


def batch(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=rng).argsort(dim=1)[:, :K]
    hidden = torch.randn(tokens, H, generator=rng).bfloat16()
    return hidden, ids.contiguous(), torch.rand(tokens, K, generator=rng)


def around(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function with operations of its own on both sides of the layer, which round nothing."""

    def function(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return call(x * 2, ids, weights) * 0.5

    return function


def nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is TARGET]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_into_one_graph(entrance: Entrance, backend: str) -> None:
    function = around(entrance.call)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for tokens in (3, 1, 7, 40):  # the second shape makes sizes symbols
        args = batch(tokens, seed=tokens)
        assert torch.equal(compiled(*args), function(*args))


def test_compiled_with_gradients_on(entrance: Entrance) -> None:
    """The backward pass is planned with the graph, and refused only when it runs."""
    function = around(entrance.call)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, ids, weights = batch(5)
    for leaves in ((x,), (weights,), (x, weights)):
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            output = compiled(x, ids, weights)
            assert output.requires_grad
            with pytest.raises(RuntimeError, match="no gradient: inference only"):
                output.sum().backward()
        for leaf in leaves:
            leaf.requires_grad_(False)
        assert torch.equal(output, function(x, ids, weights))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_one_node(entrance: Entrance, mode: str, pre_dispatch: bool) -> None:
    function, args = around(entrance.call), batch(5)
    graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(*args)
    assert len(nodes(graph.graph)) == 1
    assert torch.equal(graph(*args), function(*args))
    other = batch(5, seed=1)
    assert torch.equal(graph(*other), function(*other))


def test_jit_trace_records_the_node(entrance: Entrance) -> None:
    """Without it the trace would hold the first output as a constant."""
    function = around(entrance.call)
    traced = torch.jit.trace(function, batch(5))
    for seed in (0, 1):
        args = batch(5, seed=seed)
        assert torch.equal(traced(*args), function(*args))


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_one_node(entrance: Entrance, strict: bool) -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entrance = entrance

        def forward(self, x: torch.Tensor, i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return around(self.entrance.call)(x, i, w)

    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(
        Around(), batch(5), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}), strict=strict
    )
    assert len(nodes(program.graph)) == 1
    for count in (5, 40):
        args = batch(count, seed=2)
        assert torch.equal(program.module()(*args), around(entrance.call)(*args))


def test_two_layers_in_the_same_code_stay_two(entrance: Entrance) -> None:
    """A graph is compiled once for equal code; the handle is what it is guarded by."""
    other = ENTRANCES["wrapper"]() if entrance.call is not entrance.layer else None
    module = copy.deepcopy(entrance.layer) if other is None else other.layer
    call = module if other is None else other.call
    compiled = torch.compile(lambda f, *a: f(*a) * 2, fullgraph=True, backend="aot_eager")
    args = batch(5)
    for function in (entrance.call, call, entrance.call):
        assert torch.equal(compiled(function, *args), function(*args) * 2)
    if isinstance(module, torch.nn.Module) and not isinstance(module, HybridExperts):
        module.down_proj.data.neg_()  # type: ignore[operator, union-attr]
        assert not torch.equal(call(*args), entrance.call(*args))
        for function in (entrance.call, call):
            assert torch.equal(compiled(function, *args), function(*args) * 2)


def test_opcheck() -> None:
    module = _offloaded().layer
    for tokens in (1, 5):
        args = (*batch(tokens), module._handle.value)
        torch.library.opcheck(TARGET, args)
        torch.library.opcheck(TARGET, (args[0].t().contiguous().t(), *args[1:]))


@pytest.mark.parametrize("shape", [(0, H), (5, H), (2, 3, H)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_is_like_the_real_output(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = _offloaded().layer
    x = torch.randn(shape).to(dtype)
    rows = x.numel() // H
    ids, weights = torch.zeros(rows, K, dtype=torch.int64), torch.rand(rows, K)
    real = TARGET(x, ids, weights, module._handle.value)
    with FakeTensorMode() as mode:
        fake = TARGET(*map(mode.from_tensor, (x, ids, weights)), module._handle.value)
    for attribute in ("shape", "dtype", "device"):
        assert getattr(fake, attribute) == getattr(real, attribute)
    assert fake.stride() == real.stride() or not rows


def test_fake_follows_the_device() -> None:
    x, ids, weights = (t.to("meta") for t in batch(3))
    assert TARGET(x, ids, weights, 0).device.type == "meta"


def test_handles_keep_no_layer_alive_and_name_none_that_is_gone() -> None:
    known = set(torch_op._layers)
    layer = _wrapper().layer
    (value,) = set(torch_op._layers) - known
    gone = weakref.ref(layer)
    graph = make_fx(around(layer.forward))(*batch(2))
    del layer
    gc.collect()
    assert gone() is None and value not in torch_op._layers
    with pytest.raises(RuntimeError, match=f"handle {value} in this process.*freed"):
        graph(*batch(2))


def test_a_closed_layer_says_so() -> None:
    entrance = _wrapper()
    graph = make_fx(around(entrance.call))(*batch(2))
    entrance.layer.close()
    with pytest.raises(RuntimeError, match="layer 0"):
        graph(*batch(2))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_wrappers_have_no_copies(duplicate: Callable[[Any], Any]) -> None:
    """A copy would hold addresses of the first one's memory."""
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        duplicate(_wrapper().layer)


def test_copies_get_handles_of_their_own() -> None:
    offloaded, named = _offloaded().layer, _named().layer
    make_fx(named)(*batch(2))  # now it has one
    twin, restored = copy.deepcopy(named), pickle.loads(pickle.dumps(named))
    values = {offloaded._handle.value, copy.deepcopy(offloaded)._handle.value}
    for module in (named, twin, restored):
        (node,) = nodes(make_fx(module)(*batch(2)).graph)
        values.add(node.args[3])
    assert len(values) == 5


def _split(w: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    w.submit_forward(x, ids, weights)
    return w.sync_forward(x)  # type: ignore[no-any-return]


def _given_up(w: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    w.submit_forward(x, ids, weights)
    w.drop()
    return _split(w, x, ids, weights)


def _whole(w: Any, *args: torch.Tensor) -> torch.Tensor:
    return w.forward(*args)  # type: ignore[no-any-return]


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("call", [_whole, _split, _given_up])
def test_what_depends_on_the_call_before_breaks_the_graph(
    deferred: int, call: Callable[..., torch.Tensor]
) -> None:
    """Deferred experts arrive a layer later, and sync belongs to the submission before it."""
    torch._dynamo.reset()
    layers = [
        _wrapper(max_deferred_experts_per_token=deferred, layer_idx=layer).layer for layer in (0, 1)
    ]

    def step(*args: torch.Tensor) -> list[torch.Tensor]:
        return [call(w, *args) * 2 for w in layers]

    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager")
        for tokens in (5, 1, 9):
            args = batch(tokens)
            for got, want in zip(compiled(*args), step(*args), strict=True):
                assert torch.equal(got, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["offload", "name"])
def test_whole_models_compile(implementation: str) -> None:
    torch._dynamo.reset()
    model = build("qwen3_moe")
    if implementation == "offload":
        offload_experts(model, "MXFP4", threads=1)
    else:
        register()
        model.set_experts_implementation("hybrid_moe")
    expected = logits(model, prompt())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    assert torch.equal(logits(compiled, prompt()), expected)
    assert sum(len(nodes(graph.graph)) for graph in graphs) == model.config.num_hidden_layers
    torch._dynamo.reset()
