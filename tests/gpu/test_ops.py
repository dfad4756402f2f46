"""The kernels as operators of torch, on the CPU, where their references run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.gpu_kernels import combine, down, gate_up, ops, pack_tokens
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.gating import Gating
from hybrid_moe.gpu_kernels.layout_text import layout_from_text, layout_to_text
from tests.gpu.slots import Slots, random_slots, slot_layout

Tensor = torch.Tensor
H, I, SLOTS, E = 96, 64, 3, 5
SWIGLU = Activation(limit=7.0, alpha=1.702)


@pytest.fixture(scope="module")
def slots() -> Slots:
    """Three experts in slots that two pools share."""
    return random_slots(DENSE_FORMATS["MXFP4"], H, I, SLOTS, parts=(1, 1), bias=True)


def _layer(slots: Slots, given: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Hot experts as a function of activations, ids and weights; `given` has the four functions."""
    layout = slots.layout
    memory = torch.from_numpy(slots.memory)
    wide = torch.zeros(SLOTS, dtype=torch.int32)
    slot_of = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32)
    tables = torch.from_numpy(layout.gate_up_table), torch.from_numpy(layout.down_table)

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        packed = given.pack(x, ids, slot_of, fmt=layout.formats.gate_up, slots=SLOTS, tile=8)  # type: ignore[attr-defined]
        tiles = ExpertTiles(memory, tables[0], wide, *packed[1:])
        h = given.gate_up(layout, SWIGLU, tiles, packed.xp, ids.shape[1])  # type: ignore[attr-defined]
        y = given.down(layout, replace(tiles, table=tables[1]), h)  # type: ignore[attr-defined]
        return given.combine(y, ids, weights, slot_of)  # type: ignore[attr-defined, no-any-return]

    return layer


class _Direct:
    pack = staticmethod(pack_tokens.pack)
    gate_up = staticmethod(gate_up.gate_up)
    down = staticmethod(down.down)
    combine = staticmethod(combine.combine)


def _batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    ids = torch.randint(-1, E + 1, (tokens, 2), generator=generator)
    return x, ids, torch.rand(tokens, 2, generator=generator)


def test_a_graph_holds_the_kernels_and_serves_every_batch(slots: Slots) -> None:
    """Four nodes, no graph break, shapes as symbols, and the functions' own results."""
    direct = _layer(slots, _Direct)
    trace = make_fx(_layer(slots, ops), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph = trace(*_batch(4))
    called = [str(node.target) for node in graph.graph.nodes if "hybrid_moe" in str(node.target)]
    assert called == [
        f"hybrid_moe.gpu_{name}.default" for name in ("pack", "gate_up", "down", "combine")
    ]
    for tokens in (4, 7, 31):
        x, ids, weights = _batch(tokens)
        assert torch.equal(graph(x, ids, weights), direct(x, ids, weights))


OPERATORS: dict[str, Callable[[], tuple[torch.ops.OpOverload, tuple[object, ...]]]] = {
    "gating_topk": lambda: (
        torch.ops.hybrid_moe.gpu_gating_topk.default,
        (torch.randn(5, 8).bfloat16(), None, None, "qwen3", 2, True, 1.0, 1, 1),
    ),
    "gating_topk, groups": lambda: (
        torch.ops.hybrid_moe.gpu_gating_topk.default,
        (torch.randn(5, 8), torch.rand(8), torch.float32, "deepseek_v3", 2, True, 2.5, 4, 2),
    ),
    "gating_switch": lambda: (
        torch.ops.hybrid_moe.gpu_gating_switch.default, (torch.randn(2, 6, 4), 2, torch.bfloat16),
    ),
    "gating_soft": lambda: (torch.ops.hybrid_moe.gpu_gating_soft.default, (torch.randn(2, 6, 4),)),
    "act_quant": lambda: (
        torch.ops.hybrid_moe.gpu_act_quant.default, (torch.randn(3, 136).bfloat16(), "ue8m0"),
    ),
    "weight_dequant": lambda: (
        torch.ops.hybrid_moe.gpu_weight_dequant.default,
        (torch.randint(0, 120, (130, 200), dtype=torch.uint8), torch.rand(2, 2), torch.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    """Its schema says what it does, and its fake has the shapes, dtypes and strides of its results,
    with symbols as well."""
    operator, arguments = OPERATORS[name]()
    torch.library.opcheck(operator, arguments)


def test_operators_of_experts(slots: Slots) -> None:
    """The same of those that need slots."""
    x, ids, weights = _batch(5)
    layout, text = slots.layout, layout_to_text(slots.layout)
    slot_of = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32)
    packed = pack_tokens.pack(x, ids, slot_of, fmt=layout.formats.gate_up, slots=SLOTS, tile=8)
    memory, wide = torch.from_numpy(slots.memory), torch.zeros(SLOTS, dtype=torch.int32)
    table = torch.from_numpy(layout.gate_up_table)
    h = torch.randn(10, I).bfloat16()
    operators = torch.ops.hybrid_moe
    check = torch.library.opcheck
    check(operators.gpu_pack.default, (x, ids, slot_of, "MXFP4", SLOTS, 8))
    tiles = memory, table, wide, *packed[1:]
    check(operators.gpu_gate_up.default, (packed.xp, *tiles, text, 7.0, 1.702, 2))
    tiles = memory, torch.from_numpy(layout.down_table), wide, *packed[1:]
    check(operators.gpu_down.default, (h, *tiles, text))
    y = torch.randn(10, H)
    for cold in (None, torch.randn(5, H)):
        check(operators.gpu_combine.default, (y, ids, weights, slot_of, cold))


def test_functions_give_what_the_kernels_functions_give() -> None:
    """Dataclasses come back as such; under a fake mode too, where nothing is computed."""
    logits = torch.randn(2, 6, 4)
    routing = ops.gating_switch(logits, 2)
    assert routing.dropped.tolist() == (6 - (routing.ids >= 0).sum(-1)).tolist()
    assert torch.allclose(ops.gating_soft(logits).dispatch.sum(1), torch.ones(2, 4))
    ids, weights = ops.gating_topk(logits[0], Gating("mixtral", 2, renormalise=True))
    assert ids.shape == (6, 2) and torch.allclose(weights.sum(-1), torch.ones(6))
    y, s = ops.act_quant(torch.ones(2, 128))
    back = ops.weight_dequant(y, s[:1], torch.float32)
    assert torch.allclose(back, torch.ones(2, 128))
    with FakeTensorMode():
        fake = ops.gating_switch(torch.empty(2, 6, 4, device="cuda"), 2)
    assert fake.kept.shape == (2, 4) and fake.kept.device.type == "cuda"


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("parts", [(1,), (2, 1), (1, 1, 1)])
def test_a_layout_is_what_its_text_says(parts: tuple[int, ...], biases: bool) -> None:
    layout = slot_layout(DENSE_FORMATS["BF16"], 2880, 704, parts=parts, biases=biases)
    text = layout_to_text(layout)
    assert layout_from_text(text) == layout
    for wrong in ("", text + " 1", text.replace("BF16", "BF17"), text.replace(" 0:", " 1:")):
        with pytest.raises(ValueError):
            layout_from_text(wrong)
