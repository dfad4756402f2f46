"""Loading: only the CPU's experts, by the map, and an error for whatever does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe import wrapper as wrapper_module
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.wrapper import KTMoEWrapper
from tests.families import EXPERTS, TOP_K, Experts, FamilyFixture, write_family
from tests.hybrid_moe.cases import Batch, E, H, I, Weights, wrapper
from tests.hybrid_moe.fake_layer import FakeExpertLayer
from tests.reference import assert_within, evaluate


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(wrapper_module, "ExpertLayer", FakeExpertLayer)
    monkeypatch.setattr(FakeExpertLayer, "made", [])
    yield
    KTMoEWrapper.force_release_loader()


def fake_of(w: KTMoEWrapper) -> Any:
    return w._layer


def outputs_agree(w: KTMoEWrapper, expected: Any, batch: Batch) -> None:
    assert_within(w.forward(*batch.args).double().numpy(), expected)


def test_checkpoint(tmp_path: Path) -> None:
    weights, batch = Weights.random(), Batch.random()
    w = wrapper(weight_path=weights.save(tmp_path, layer=4), layer_idx=4)
    assert not w.loaded
    w.load_weights(torch.arange(E))
    assert w.loaded and w.nbytes > 0
    outputs_agree(w, weights.expected(batch), batch)


def test_layers_of_one_path_share_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_moe.loaders.checkpoint import Checkpoint

    opened = []
    real = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda path: opened.append(path) or real(path))
    path = Weights.random().save(tmp_path)
    for _ in range(2):
        wrapper(weight_path=path).load_weights()
    assert len(opened) == 1
    KTMoEWrapper.force_release_loader()
    wrapper(weight_path=path).load_weights()
    assert len(opened) == 2


def test_experts_of_the_gpu_are_not_loaded(tmp_path: Path) -> None:
    weights, batch = Weights.random(), Batch.random()
    mask = torch.arange(E) % 3 == 0
    w = wrapper(weight_path=weights.save(tmp_path), gpu_experts_mask=mask)
    w.load_weights()
    assert sorted(fake_of(w).tensors) == np.flatnonzero(~mask.numpy()).tolist()
    outputs_agree(w, weights.expected(batch, skip=mask.numpy()), batch)


@pytest.mark.parametrize("from_tensors", [False, True])
def test_map_of_physical_to_logical_experts(tmp_path: Path, from_tensors: bool) -> None:
    weights = Weights.random()
    mapping = torch.tensor([3, 1, 7, 0, 0, 5, 2, 6, 4, 3])  # ten ids over eight experts
    batch = Batch.random(experts=10)
    sizes = {"num_experts": 10}
    if from_tensors:
        w = weights.load(wrapper(**sizes), mapping)
    else:
        w = wrapper(weight_path=weights.save(tmp_path), **sizes)
        w.load_weights(mapping)
    mapped = Weights(weights.gate[mapping], weights.up[mapping], weights.down[mapping])
    outputs_agree(w, mapped.expected(batch), batch)


BAD_MAPS: list[tuple[Any, type[Exception], str]] = [
    ([0] * E, TypeError, "must be an int64 tensor, not list"),
    (torch.zeros(E), TypeError, "must be torch.int64, not torch.float32"),
    (torch.zeros(E - 1, dtype=torch.int64), ValueError, r"shape \(7,\), must be \(8,\)"),
    (torch.zeros(E, 1, dtype=torch.int64), ValueError, r"shape \(8, 1\)"),
    (torch.arange(E) - 1, ValueError, r"map_cpu\[0\] is -1"),
    (torch.arange(E) + 1, ValueError, r"\[7\].*8"),
    (torch.arange(E, device="meta"), ValueError, "must be on the CPU"),
]


@pytest.mark.parametrize("from_tensors", [False, True])
@pytest.mark.parametrize(("mapping", "error", "message"), BAD_MAPS, ids=lambda v: str(v)[:30])
def test_bad_map(
    tmp_path: Path, from_tensors: bool, mapping: Any, error: type[Exception], message: str
) -> None:
    weights = Weights.random()
    w = wrapper(weight_path=weights.save(tmp_path))
    with pytest.raises(error, match=message):
        weights.load(w, mapping) if from_tensors else w.load_weights(mapping)
    assert not w.loaded


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128}, r"hidden_size is 128, but layer 0 of .* has 64 .*padding"),
        ({"moe_intermediate_size": 128}, "moe_intermediate_size is 128, but layer 0 of .* has 96"),
        ({"num_experts": 4}, "num_experts is 4, but layer 0 of .* has 8 experts"),
        ({"layer_idx": 5}, "layer 5"),
    ],
)
def test_layer_that_the_checkpoint_does_not_have(
    tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    w = wrapper(weight_path=Weights.random().save(tmp_path), **sizes)
    with pytest.raises(CheckpointError, match=message):
        w.load_weights()


def test_more_ids_than_experts_need_a_map(tmp_path: Path) -> None:
    w = wrapper(weight_path=Weights.random().save(tmp_path), num_experts=9)
    with pytest.raises(ValueError, match=r"\[8\] = 8: the checkpoint has experts 0 to 7"):
        w.load_weights()


def test_load_twice(tmp_path: Path) -> None:
    weights = Weights.random()
    w = wrapper(weight_path=weights.save(tmp_path))
    w.load_weights()
    with pytest.raises(RuntimeError, match="layer 0 has its weights already"):
        w.load_weights()
    with pytest.raises(RuntimeError, match="layer 0 has its weights already"):
        weights.load(w)


def test_no_path() -> None:
    with pytest.raises(ValueError, match="needs the weight_path"):
        wrapper().load_weights()


def family_wrapper(fixture: FamilyFixture, layer: int, **arguments: Any) -> KTMoEWrapper:
    return wrapper(
        weight_path=fixture.directory, layer_idx=layer, num_experts=fixture.num_experts,
        num_experts_per_tok=TOP_K, moe_intermediate_size=fixture.intermediate, **arguments,
    )  # fmt: skip


def family_batch() -> Batch:
    batch = Batch.random(experts=EXPERTS)
    return Batch(batch.hidden, batch.ids[:, :TOP_K].contiguous(), batch.weights[:, :TOP_K])


def family_outputs_agree(w: KTMoEWrapper, layer: Experts) -> None:
    batch = family_batch()
    inputs = (batch.hidden.double(), batch.ids, batch.weights.float())
    biases = {
        f"{name}_bias": bias
        for name in ("gate", "up", "down")
        if (bias := getattr(layer, f"{name}_bias")) is not None
    }
    expected = evaluate(
        *(tensor.numpy() for tensor in inputs), layer.gate, layer.up, layer.down, **biases
    )
    outputs_agree(w, expected, batch)


@pytest.mark.parametrize("method", [None, "STORED", "stored"])
def test_a_layer_in_the_format_that_is_stored(tmp_path: Path, method: str | None) -> None:
    fixture = write_family("qwen3_moe_mixed", tmp_path)
    for number, layer in fixture.layers.items():
        w = family_wrapper(fixture, number, method=method)
        assert w.method == fixture.methods[number]
        w.load_weights()
        family_outputs_agree(w, layer)


def test_a_format_that_the_layer_does_not_become(tmp_path: Path) -> None:
    fixture = write_family("qwen3_moe_mixed", tmp_path)
    w = family_wrapper(fixture, 0, method="BF16")
    with pytest.raises(ValueError, match=r"layer 0 of .* stores its experts as MXFP4, which does"):
        w.load_weights()
    assert not fake_of(w).resident.any() and not w.loaded
    other = family_wrapper(fixture, 1, method="BF16")  # a wrapper is one layer: this one is well
    other.load_weights()
    family_outputs_agree(other, fixture.layers[1])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("name", "layout"), [("gpt_oss", "interleaved"), ("privacy_filter", "halves")]
)
def test_fused_experts_with_biases(tmp_path: Path, name: str, layout: str, known: bool) -> None:
    """The same names for two layouts: the model in config.json tells, or the caller."""
    fixture = write_family(name, tmp_path)
    if not known:
        (fixture.directory / "config.json").unlink()
        w = family_wrapper(fixture, 1, method="BF16")
        with pytest.raises(CheckpointError, match='Say gate_up_layout="halves" or "interleaved"'):
            w.load_weights()
        assert not fake_of(w).resident.any() and not w.loaded
    w = family_wrapper(fixture, 1, method="BF16", gate_up_layout=None if known else layout)
    w.load_weights()
    family_outputs_agree(w, fixture.layers[1])


def test_a_layout_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gate_up_layout is 'thirds', must be halves or inter"):
        wrapper(gate_up_layout="thirds")
    w = family_wrapper(write_family("gpt_oss", tmp_path), 0, gate_up_layout="halves")
    with pytest.raises(ValueError, match=r'gate_up_layout is "halves", but .* "interleaved"'):
        w.load_weights()


def test_failed_load_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    weights = Weights.random()
    w = wrapper()
    broken = Weights(weights.gate.clone(), weights.up, weights.down)
    broken.gate[5, 0, 0] = float("nan")
    first = fake_of(w)
    with pytest.raises(CheckpointError, match=r"gate_proj\[5\]: holds a NaN"):
        broken.load(w)
    assert first.closed and not w.loaded
    with pytest.raises(RuntimeError, match="no weights"):
        w.forward(*Batch.random().args)
    weights.load(w)
    outputs_agree(w, weights.expected(Batch.random()), Batch.random())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", DENSE_FORMATS)
def test_tensors_of_any_float_type(dtype: torch.dtype, method: str) -> None:
    weights = Weights.random()
    rounded = [t.to(dtype) for t in (weights.gate, weights.up, weights.down)]
    w = wrapper(method=method)
    w.load_weights_from_tensors(*rounded)
    batch = Batch.random()
    outputs_agree(w, Weights(*(t.float() for t in rounded)).expected(batch, method), batch)


def test_biases() -> None:
    weights, batch = Weights.random(bias=True), Batch.random()
    outputs_agree(weights.load(wrapper()), weights.expected(batch), batch)


@pytest.mark.parametrize(
    ("fmt", "scale_type"),
    [(MXFP4, torch.uint8), (MXFP4, torch.float8_e8m0fnu), (INT8, torch.float16)],
)
def test_codes_that_are_quantized_already(fmt: WeightFormat, scale_type: torch.dtype) -> None:
    weights, batch, w = Weights.random(), Batch.random(), wrapper(method=fmt.name)
    codes, scales = {}, {}
    for name in ("gate", "up", "down"):
        c, s = weights.quantized(name, fmt)
        codes[f"{name}_proj"] = torch.from_numpy(c)
        scales[f"{name}_scale"] = torch.from_numpy(s).view(scale_type)
    w.load_weights_from_tensors(**codes, **scales)
    outputs_agree(w, weights.expected(batch, fmt.name), batch)


def test_codes_of_another_format_are_refused() -> None:
    """The codes of MXFP4 are bytes of two, and its scales powers of two."""
    weights = [torch.zeros(E, *shape) for shape in ((I, H), (I, H), (H, I))]
    w = wrapper(method="INT8")
    with pytest.raises(TypeError, match=r"dtype torch\.uint8, must be a float type or int8 INT8"):
        w.load_weights_from_tensors(weights[0].to(torch.uint8), *weights[1:])
    with pytest.raises(TypeError, match=r"gate_scale has dtype torch\.bfloat16, must be float16"):
        w.load_weights_from_tensors(
            weights[0].to(torch.int8), *weights[1:], gate_scale=torch.ones(E, I, 2).bfloat16()
        )
    scales = torch.full((E, I, 2), torch.inf, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"gate_proj\[\d\]: a fp16 scale is inf, which is no"):
        w.load_weights_from_tensors(weights[0].to(torch.int8), *weights[1:], gate_scale=scales)


CODES = {"gate_proj": torch.zeros(E, I, H // 2, dtype=torch.uint8)}

BAD_TENSORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gate_proj": np.zeros((E, I, H))}, TypeError, "gate_proj must be a tensor, not ndarray"),
    ({"up_proj": torch.zeros(E, H, I)}, ValueError, r"up_proj has shape \(8, 64, 96\), must be"),
    ({"up_proj": torch.zeros(E - 1, I, H)}, ValueError, r"up_proj has shape \(7, 96, 64\)"),
    ({"down_proj": torch.zeros(E, I, H)}, ValueError, r"must be \(8, 64, 96\)"),
    ({"down_proj": torch.zeros(H)}, ValueError, "down_proj has shape"),
    ({"gate_proj": torch.zeros(())}, ValueError, "gate_proj has shape"),
    ({"gate_proj": torch.zeros(E, I, H).long()}, TypeError, "gate_proj has dtype torch.int64"),
    (CODES, ValueError, "gate_scale is missing"),
    ({"up_scale": torch.zeros(E, I, 2)}, ValueError, "up_scale is given, but up_proj is"),
    (
        {**CODES, "gate_scale": torch.zeros(E, I, 3, dtype=torch.uint8)},
        ValueError,
        r"gate_scale has shape \(8, 96, 3\), must be \(8, 96, 2\)",
    ),
    (
        {**CODES, "gate_scale": torch.full((E, I, 2), 255, dtype=torch.uint8)},
        CheckpointError,
        r"gate_proj\[\d\]: a ue8m0 scale is 255",
    ),
    ({**CODES, "gate_scale": torch.ones(E, I, 2)}, TypeError, "gate_scale has dtype"),
    ({"down_bias": torch.zeros(E, I)}, ValueError, r"down_bias has shape \(8, 96\)"),
    (
        {"down_bias": torch.full((E, H), float("inf"))},
        CheckpointError,
        r"down_bias\[\d\]: holds a NaN or an infinity",
    ),
]


@pytest.mark.parametrize(("tensors", "error", "message"), BAD_TENSORS, ids=lambda v: str(v)[:24])
def test_bad_tensors(tensors: dict[str, Any], error: type[Exception], message: str) -> None:
    weights, w = Weights.random(), wrapper()
    good = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
    with pytest.raises(error, match=message):
        w.load_weights_from_tensors(**{**good, **tensors})
    assert not w.loaded


def test_all_experts_on_the_gpu() -> None:
    batch, weights = Batch.random(), Weights.random()
    w = weights.load(wrapper(num_gpu_experts=E))
    y = w.forward(*batch.args)
    assert y.dtype == torch.bfloat16 and y.shape == batch.hidden.shape and not y.any()
