"""`experts_implementation="hybrid_moe"` runs with the weights that its module has now, however they
came there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from hybrid_moe.integrations.transformers import dispatch
from hybrid_moe.integrations.transformers.experts_module import find_experts
from hybrid_moe.integrations.transformers.registration import register
from tests.hybrid_moe.tiny_models import FAMILIES, build, logits, offload_experts, prompt

Change = Callable[[Any], None]
"""Changes the weights of an experts module."""


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The modules that were packed, one entry a packing."""
    packed: list[torch.nn.Module] = []
    fill = dispatch.fill

    def counted(layer: Any, module: torch.nn.Module, *args: Any) -> None:
        packed.append(module)
        fill(layer, module, *args)

    monkeypatch.setattr(dispatch, "fill", counted)
    return packed


def named(family: str = "qwen3_moe", **options: Any) -> Any:
    register()
    model = build(family)
    model.config.hybrid_moe_options = {"threads": 1, **options}
    model.set_experts_implementation("hybrid_moe")
    return model


def experts_of(model: Any) -> Any:
    return next(iter(find_experts(model).values()))


def fresh(model: Any) -> torch.Tensor:
    """What the model's present weights give: a copy that has packed nothing, offloaded."""
    twin = copy.deepcopy(model)
    for module in find_experts(twin).values():
        module.__dict__.pop("_hybrid_moe_packed", None)
    return logits(offload_experts(twin, "BF16", threads=1), prompt())


def _no_grad(write: Change) -> Change:
    def change(module: Any) -> None:
        with torch.no_grad():
            write(module)

    return change


def _one_bit(module: Any) -> None:
    module.down_proj.data.view(torch.int16)[0, 0, 0] ^= -(2**15)


def _swap_experts(module: Any) -> None:
    module.down_proj.data[[0, 1]] = module.down_proj.data[[1, 0]]


def _swap_rows(module: Any) -> None:
    module.down_proj.data[:, [0, 5]] = module.down_proj.data[:, [5, 0]]


def _through_numpy(module: Any) -> None:
    module.down_proj.detach().view(torch.int16).numpy().view(np.uint16)[...] ^= 0x8000


def _optimizer(module: Any) -> None:
    module.down_proj.grad = torch.ones_like(module.down_proj)
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    module.down_proj.grad = None


def _vector(module: Any) -> None:
    vector_to_parameters(-parameters_to_vector(module.parameters()).detach(), module.parameters())


def _load(module: Any) -> None:
    module.load_state_dict({name: -w for name, w in module.state_dict().items()})


def _assign(module: Any) -> None:
    module.load_state_dict({n: -w for n, w in module.state_dict().items()}, assign=True)


def _set(module: Any) -> None:
    module.down_proj.set_(-module.down_proj.detach())


def _same_address(module: Any) -> None:
    """Another storage whose memory the first one had, as allocators hand it out again."""
    weights, address = -module.down_proj.data, module.down_proj.data_ptr()
    memory = torch.frombuffer(
        np.ctypeslib.as_array(
            (np.ctypeslib.ctypes.c_uint8 * (weights.numel() * 2)).from_address(address)
        ),
        dtype=torch.bfloat16,
    ).view(weights.shape)
    module.kept = module.down_proj.data
    memory.copy_(weights)
    module.down_proj.data = memory
    assert module.down_proj.data_ptr() == address


def _inference_mode(module: Any) -> None:
    with torch.inference_mode():
        module.down_proj.data.neg_()


def _other_dtype(module: Any) -> None:
    module.to(torch.float32)
    with torch.no_grad():
        module.down_proj.mul_(-1)


def _transposed(module: Any) -> None:
    """The same shape, other strides."""
    module.down_proj.data = (-module.down_proj.data).transpose(1, 2).contiguous().transpose(1, 2)


def _replaced(module: Any) -> None:
    module.down_proj = torch.nn.Parameter(-module.down_proj.detach())


def _parametrized(module: Any) -> None:
    class Negative(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    parametrize.register_parametrization(module, "down_proj", Negative())


CHANGES: dict[str, Change] = {
    ".data in place": lambda m: m.down_proj.data.neg_(),
    ".data of one element": _one_bit,
    ".data of some experts": lambda m: m.down_proj.data[2:].zero_(),
    ".data: experts change places": _swap_experts,
    ".data: rows change places": _swap_rows,
    ".data of gate_up": lambda m: m.gate_up_proj.data.mul_(2),
    ".data replaced": lambda m: setattr(m.down_proj, "data", -m.down_proj.data),
    ".data replaced at the same address": _same_address,
    ".data with other strides": _transposed,
    "detach": _no_grad(lambda m: m.down_proj.detach().neg_()),
    "no_grad": _no_grad(lambda m: m.down_proj.neg_()),
    "copy_ through a view": _no_grad(lambda m: m.down_proj[1:3].copy_(-m.down_proj[1:3])),
    "set_": _no_grad(_set),
    "storage": lambda m: m.down_proj.untyped_storage().copy_((-m.down_proj.data).untyped_storage()),
    "NumPy": _through_numpy,
    "load_state_dict": _load,
    "load_state_dict, assign": _assign,
    "another parameter": _replaced,
    "optimizer": _optimizer,
    "vector_to_parameters": _vector,
    "inference mode": _inference_mode,
    "dtype": _other_dtype,
    "parametrization": _parametrized,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str) -> None:
    model = named()
    before = logits(model, prompt())
    assert torch.equal(before, fresh(model))
    CHANGES[name](experts_of(model))
    after = logits(model, prompt())
    if name == "parametrization":  # which offload refuses
        parametrize.remove_parametrizations(experts_of(model), "down_proj")
    assert torch.equal(after, fresh(model))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", [".data in place", "NumPy", "no_grad"])
@pytest.mark.parametrize("moved", ["inference tensors", "from_numpy", "shared"])
def test_changes_of_weights_in_other_memory(name: str, moved: str) -> None:
    """Inference tensors count no writes; arrays and shared memory are written from elsewhere."""
    model = named()
    module = experts_of(model)
    weights = module.down_proj.detach()
    if moved == "from_numpy":
        array = weights.view(torch.int16).numpy().copy()
        weights = torch.from_numpy(array).view(torch.bfloat16)
    elif moved == "shared":
        weights = weights.clone().share_memory_()
    else:
        with torch.inference_mode():
            weights = weights.clone()
    with torch.inference_mode(moved == "inference tensors"):
        module.down_proj = torch.nn.Parameter(weights, requires_grad=False)
        before = logits(model, prompt())
        CHANGES[name](module)
        after = logits(model, prompt())
    if moved == "from_numpy":
        assert np.array_equal(array, module.down_proj.detach().view(torch.int16).numpy())
    plain = copy.deepcopy(model)
    experts_of(plain).down_proj = torch.nn.Parameter(module.down_proj.detach().clone())
    assert torch.equal(after, fresh(plain))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_watched(family: str) -> None:
    model = named(family)
    module = experts_of(model)
    for name, parameter in module.named_parameters():
        before = logits(model, prompt())
        parameter.data.neg_()
        after = logits(model, prompt())
        assert not torch.equal(after, before), name
        assert torch.equal(after, fresh(model)), name


def test_equal_weights_are_packed_once(packings: list[torch.nn.Module]) -> None:
    model = named()
    layers = len(find_experts(model))
    expected = logits(model, prompt())
    assert len(packings) == layers
    for module in find_experts(model).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
            parameter.data.neg_().neg_()
    assert torch.equal(logits(model, prompt()), expected)
    assert torch.equal(logits(copy.deepcopy(model), prompt()), expected)
    assert len(packings) == layers


def test_an_expert_that_no_token_uses_is_looked_at_when_one_does(
    packings: list[torch.nn.Module],
) -> None:
    module = experts_of(named())
    x, weights = torch.randn(1, 64).bfloat16(), torch.ones(1, 1)
    with torch.no_grad():
        first = module(x, torch.tensor([[0]]), weights)
        module.down_proj.data[3].neg_()
        assert torch.equal(module(x, torch.tensor([[0]]), weights), first)
        assert len(packings) == 1
        third = module(x, torch.tensor([[3]]), weights)
        assert len(packings) == 2
        module.down_proj.data[3].neg_()
        assert torch.equal(module(x, torch.tensor([[3]]), weights), -third)


def test_weights_that_accelerate_brings_are_packed_once_and_a_warning_says_what_is_better(
    packings: list[torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    accelerate = pytest.importorskip("accelerate")
    dispatch._warn_of_offloading.cache_clear()
    model = named()
    expected = logits(build("qwen3_moe"), prompt())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        outputs = [logits(model, prompt()) for _ in range(3)]
    assert len(packings) == model.config.num_hidden_layers
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    tolerance = 4 * model.config.num_hidden_layers * 2.0**-8 * expected.abs().max()
    assert (outputs[0] - expected).abs().max() <= tolerance
    said = [r for r in caplog.records if "hybrid_moe.from_pretrained" in r.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("way", ["meta", "freed", "freed, with other strides"])
def test_weights_without_memory_are_refused(way: str) -> None:
    module = experts_of(named())
    x, ids, weights = torch.randn(1, 64).bfloat16(), torch.tensor([[0]]), torch.ones(1, 1)
    module(x, ids, weights)
    if way == "meta":
        module.to("meta")
    else:
        module.down_proj.data = module.down_proj.data.clone()
        if way != "freed":
            _transposed(module)
        module.down_proj.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory now"):
        module(x, ids, weights)


def test_one_expert_whose_first_stride_means_nothing() -> None:
    """Strides of axes of one element are arbitrary, and count as contiguous."""
    module = experts_of(named())
    for name, parameter in list(module.named_parameters()):
        one = parameter.detach()[:1].clone()
        strides = (1, *one.stride()[1:])
        setattr(module, name, torch.nn.Parameter(one.as_strided(one.shape, strides)))
    module.num_experts = 1
    x, ids, weights = torch.randn(2, 64).bfloat16(), torch.zeros(2, 1).long(), torch.ones(2, 1)
    with torch.no_grad():
        before = module(x, ids, weights)
        module.down_proj.data[0, -1, -1] = 100
        assert not torch.equal(module(x, ids, weights), before)
        assert not module(x, ids - 1, weights).any()  # no expert at all


def test_compiled_models_see_changes_too() -> None:
    torch._dynamo.reset()
    model = named()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        before = logits(compiled, prompt())
        experts_of(model).down_proj.data.neg_()
        after = logits(compiled, prompt())
    assert torch.equal(after, logits(model, prompt()))
    assert not torch.equal(after, before)
    torch._dynamo.reset()


@pytest.mark.parametrize("parametrized", [False, True])
def test_several_threads_use_one_module(parametrized: bool) -> None:
    """They may all meet it unpacked; a change between two rounds is met by all of them too."""
    model = named()
    experts = experts_of(model)
    if parametrized:
        parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    source = experts.parametrizations.down_proj.original if parametrized else experts.down_proj
    x, ids = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [2, 3], [4, 5]])
    weights = torch.rand(3, 2)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        first = experts(x, ids, weights)
        for factor in (1, -1, 1):
            experts.__dict__.pop("_hybrid_moe_packed", None)
            for _ in range(2):
                done = [pool.submit(experts, x, ids, weights) for _ in range(16)]
                assert all(torch.equal(one.result(), factor * first) for one in done)
            source.data.neg_()
