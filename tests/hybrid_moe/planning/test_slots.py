"""Plans for experts on GPUs that are this package's: slots of the CPU's bytes, whole experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.formats.shares import ShareLayout, even_shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.weight_format import layer_formats
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.planning import Model, make_plan, read_model
from hybrid_moe.planning.plan import GPU, Plan
from tests.families import write_family
from tests.hybrid_moe.planning.cases import request
from tests.hybrid_moe.planning.conftest import Fake

NAME = "routed experts, MXFP4"


@pytest.fixture(scope="module")
def slots(fake: Fake) -> Model:
    return read_model(fake("gpt-oss-20b"), gpu_backend="cute")


def on_each_gpu(plan: Plan) -> int:
    return next((part.nbytes for part in plan.parts if part.name == NAME), 0)


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_an_expert_takes_a_slot(slots: Model, pools: int) -> None:
    """Biases included, however many pools share it."""
    fmt, H, I = slots.formats[0], slots.hidden, slots.intermediate
    blocks = even_shares(I // GROUP, (1,) * pools).tolist()
    strips = even_shares(round_up(H, STRIP_ROWS) // STRIP_ROWS, (1,) * pools).tolist()
    shares = tuple(
        ShareLayout(
            range(*blocks[pool : pool + 2]),
            range(*strips[pool : pool + 2]),
            strip_layout(fmt, H),
            strip_layout(fmt, I),
            biases=True,
        )
        for pool in range(pools)
    )
    assert slots.layers[0].on_gpu == SlotLayout(layer_formats(fmt), H, I, shares).nbytes


@given(gib=st.integers(6, 40), gpus=st.integers(1, 4))
def test_the_fullest_gpu_holds_whole_experts(slots: Model, gib: int, gpus: int) -> None:
    asked = request(f"{gpus}x{gib}GB")
    plan = make_plan(slots, asked)
    each, hot = slots.layers[0].on_gpu, plan.hot.most
    if plan.shortages:
        return
    # Its rank begins in every layer whose number has the same remainder.
    layers, more = len(slots.layers), hot % gpus
    fullest = layers * (hot // gpus) + max(
        sum((rank - layer) % gpus < more for layer in range(layers)) for rank in range(gpus)
    )
    assert on_each_gpu(plan) == fullest * each
    assert plan.nbytes(GPU) <= asked.room
    if hot < slots.num_experts:
        assert make_plan(slots, replace(asked, num_gpu_experts=hot + 1)).nbytes(GPU) > asked.room


def test_any_format_can_be_on_the_gpu(fake: Fake, tmp_path: Path) -> None:
    """Nothing is read from what SGLang finds, so it may be what it does not know."""
    converted = fake("Qwen3-30B-A3B-MXFP4")
    theirs, ours = (read_model(converted, gpu_backend=backend) for backend in (None, "cute"))
    assert not theirs.hot_possible and ours.hot_possible
    plan = make_plan(ours, request("24GB"))
    assert on_each_gpu(plan) == plan.hot.most * sum(la.packed for la in ours.layers) > 0
    assert not any("--base" in note for note in plan.notes)
    mixed = read_model(write_family("qwen3_moe_mixed", tmp_path).directory, gpu_backend="cute")
    assert [la.on_gpu for la in mixed.layers] == [la.packed for la in mixed.layers]
    assert make_plan(mixed, request("8GB", context=64)).hot.most == mixed.num_experts
