"""Models whose experts are split between slots and strips, with the torch back end: the hot half is
computed by the kernels' references."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.weight_format import layer_formats
from hybrid_moe.gpu_kernels import toolchain
from hybrid_moe.gpu_kernels.toolchain import Availability
from hybrid_moe.integrations.transformers import loading
from hybrid_moe.integrations.transformers.hit_rates import HitRates, hit_rates
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.model_split import ModelSplit, surrounding_device
from hybrid_moe.integrations.transformers.options import ExpertsOptions, choose_backend
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload
from hybrid_moe.integrations.transformers.split_experts import SplitExperts, SplitSpec
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.model_config import ModelConfig
from hybrid_moe.placement.profile import write_profile
from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.integrations.dense.test_saving import assert_same
from tests.hybrid_moe.integrations.loading_cases import hybrid_experts, load
from tests.hybrid_moe.integrations.test_transformers_loading import ExpertShapes
from tests.hybrid_moe.tiny_models import FAMILIES, build, greedy, logits, offload_experts, prompt

CLEAR = 0.019
"""Of the largest logit: by more than this the tiny models decide, see `tiny_models.SEEDS`."""

HALF = {"gpu_experts": 0.5, "gpu_backend": "torch"}


def split_layers(model: Any) -> list[SplitExperts]:
    layers = [module.layer for module in hybrid_experts(model)]
    assert layers and all(isinstance(layer, SplitExperts) for layer in layers)
    return layers  # type: ignore[return-value]


def hot(model: Any) -> list[list[int]]:
    """Hot ids of each layer."""
    masks = (layer.wrapper.gpu_experts_mask for layer in split_layers(model))
    return [mask.nonzero().flatten().tolist() for mask in masks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny Qwen3-MoE: two layers of eight experts, three of them a token."""
    return save(build("qwen3_moe"), tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def half(folder: Path) -> Any:
    """Its model, half of the experts hot."""
    return load(folder, "MXFP4", **HALF)


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "MXFP4") for family in FAMILIES), ("qwen3_moe", "BF16"), ("gpt_oss", "INT8")],
)
def test_says_what_the_cpu_alone_says(family: str, method: str) -> None:
    """Activations have 15 bits in the CPU's integer kernels and BF16's in slots' kernels, so logits
    differ by a few of BF16's roundings; what the model decides, both decide."""
    expected = offload_experts(build(family), method, threads=1)
    model = build(family)
    attention = model.config._attn_implementation
    offload(model, method, threads=1, dense="torch", progress=False, **HALF)
    model.set_attn_implementation(attention)
    one, other = logits(model, prompt()), logits(expected, prompt())
    assert float((one - other).abs().max()) <= CLEAR * float(other.abs().max())
    assert greedy(model, prompt()) == greedy(expected, prompt())
    assert all(0 < count < total for count, total in hit_rates(model).layers.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["MXFP4", None])
def test_offload_and_from_pretrained_agree(folder: Path, method: str | None, half: Any) -> None:
    loaded = load(folder, method, **HALF)
    moved = offload(build("qwen3_moe"), method or "BF16", threads=1, progress=False, **HALF)
    assert hot(loaded) == hot(moved) == [[0, 1, 2, 3]] * 2
    assert torch.equal(logits(loaded, prompt()), logits(moved, prompt()))
    assert "4 of them on cpu" in repr(loaded)


def test_each_form_of_gpu_experts(folder: Path, tmp_path: Path) -> None:
    chosen = {0: [1, 6], 1: []}
    write_profile(tmp_path / "hot.json", chosen)
    masks = torch.zeros(2, 8, dtype=torch.bool)
    masks[0, chosen[0]] = True
    expert = 3 * 64 * 96 * 17 // 32  # three matrices in MXFP4: 17 bytes for 32 weights
    budget = f"{3 * expert + 100}B"
    forms: list[tuple[Any, list[list[int]]]] = [
        ("25%", [[0, 1], [0, 1]]), (0.0, [[], []]), (1.0, [[*range(8)]] * 2),
        (budget, [[0, 1], [0]]), (masks, [[1, 6], []]), (tmp_path / "hot.json", [[1, 6], []]),
    ]  # fmt: skip
    for gpu_experts, expected in forms:
        model = load(folder, "MXFP4", dense="torch", gpu_experts=gpu_experts, gpu_backend="torch")
        assert hot(model) == expected, gpu_experts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu_experts": 1.5}, ValueError, "gpu_experts is 1.5"),
        ({"gpu_experts": 2}, ValueError, "gpu_experts is 2, and a number"),
        ({"gpu_experts": [1, 2]}, TypeError, r"gpu_experts is \[1, 2\]"),
        ({"gpu_experts": "12B"}, ValueError, "too little for one expert"),
        ({"gpu_experts": "nowhere.json"}, FileNotFoundError, "gpu_experts is 'nowhere.json'"),
        ({"gpu_experts": {0: [0]}}, ValueError, "gpu_experts has no layer 1"),
        ({"gpu_experts": {0: [8], 1: []}}, ValueError, "layer 0 has expert 8"),
        ({"gpu_experts": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"must be \[2, 8\]"),
        ({"gpu_experts": 0.5, "gpu_backend": "triton"}, ValueError, "gpu_backend is 'triton'"),
        ({"gpu_experts": 0.5, "gpu_backend": "cute", "device_map": "cpu"}, ValueError,
         'gpu_backend="cute" cannot be used here: the model is on the CPU'),
        ({"gpu_backend": "torch"}, ValueError, "'torch', but no expert is to be on a GPU"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_loading(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(loading, "load_skeleton", never)
    with pytest.raises(error, match=message):
        load(folder, "MXFP4", **options)
    options.pop("device_map", None)
    model = build("qwen3_moe")
    with pytest.raises(error, match=message):
        offload(model, "MXFP4", threads=1, progress=False, **options)
    assert not any(isinstance(module, HybridExperts) for module in model.modules())


def test_a_configuration_without_experts_per_token_is_refused() -> None:
    masks = {3: torch.zeros(8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"config\.json does not say how many .* in layer 3"):
        ModelSplit("torch", masks, ModelConfig({}))


def test_the_back_end_is_chosen_by_what_there_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def there_is(usable: bool, reason: str) -> None:
        monkeypatch.setattr(toolchain, "availability", lambda: Availability(usable, reason))

    there_is(True, "sm_90")
    assert choose_backend(None, None) == choose_backend("cute", True) == "cute"
    assert choose_backend("torch", True) == "torch"
    assert choose_backend(None, False) == "torch"
    assert "computed by torch, which is slow: the model is on the CPU" in caplog.text
    there_is(False, "the moon is full")
    for _ in range(2):
        assert choose_backend(None, True) == "torch"
    assert caplog.text.count("computed by torch, which is slow: the moon is full") == 1
    with pytest.raises(ValueError, match='gpu_backend="cute" cannot be used here: the moon is ful'):
        choose_backend("cute", None)


def test_cute_kernels_bring_the_model_to_the_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that goes without one: what Transformers is asked for."""
    asked: dict[str, Any] = {}

    def skeleton(checkpoint: Any, kwargs: Any, dense: Any) -> None:
        asked.update(kwargs, dense=dense)
        raise InterruptedError

    monkeypatch.setattr(loading, "load_skeleton", skeleton)
    monkeypatch.setattr(toolchain, "availability", lambda: Availability(True, "pretended"))
    for given, expected in ((None, "cuda"), ("cuda:0", "cuda:0")):
        with pytest.raises(InterruptedError):
            load(folder, "MXFP4", gpu_experts=0.5, device_map=given)
        assert asked["device_map"] == expected and asked["dense"] is None


def test_cute_kernels_need_the_layer_on_a_gpu(half: Any) -> None:
    module = next(hybrid_experts(half))
    split = SplitSpec(0, 3, torch.zeros(8, dtype=torch.bool), "cute", torch.device("cpu"))
    empty, options = HybridExperts(module.spec), ExpertsOptions("MXFP4", threads=1)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts .* is on cpu"):
        empty.allocate_split(options, layer_formats(MXFP4), split)
    with pytest.raises(RuntimeError, match="before its experts are loaded"):
        empty(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 3).long(), torch.zeros(1, 3))


def test_the_device_is_the_router_s() -> None:
    model = torch.nn.Module()
    model.embed, model.block = torch.nn.Linear(2, 2), torch.nn.Module()
    model.block.gate = torch.nn.Linear(2, 2, device="meta")
    model.block.experts = torch.nn.Module()
    assert surrounding_device(model, "block.experts").type == "cpu"  # meta tells nothing


def test_saved_models_have_the_hot_experts_too(tmp_path: Path) -> None:
    """gpt-oss has biases, and tensors of all experts together."""
    folder = save(build("gpt_oss"), tmp_path / "made")
    load(folder, "MXFP4").save_pretrained(tmp_path / "cold")
    load(folder, "MXFP4", **HALF).save_pretrained(tmp_path / "split")
    assert_same(tmp_path / "cold", tmp_path / "split")
    again = load(tmp_path / "split", None, **HALF)
    assert torch.equal(logits(again, prompt()), logits(load(folder, "MXFP4", **HALF), prompt()))


def test_experts_that_have_moved(half: Any) -> None:
    """What is written of a model follows its experts to the other half and back."""
    module, layer = next(hybrid_experts(half)), split_layers(half)[0]
    before, said = [module.unpack(e) for e in range(8)], logits(half, prompt())
    layer.wrapper.demote(0)
    layer.wrapper.promote(7)
    assert hot(half)[0] == [1, 2, 3, 7]
    for expert, tensors in enumerate(before):
        for name in ("gate", "up", "down"):
            one, other = getattr(tensors, name), getattr(module.unpack(expert), name)
            assert np.array_equal(one.codes, other.codes)
            assert np.array_equal(one.scales, other.scales)
    now = logits(half, prompt())
    assert float((now - said).abs().max()) <= CLEAR * float(said.abs().max())
    for expert in (-1, 8):
        with pytest.raises(IndexError, match=rf"expert is {expert}, must be in 0\.\.7"):
            layer.unpack(expert)


def test_copies_share_both_halves(half: Any) -> None:
    assert not any("experts" in name for name in half.state_dict())
    expected = logits(half, prompt())
    twin = copy.deepcopy(half)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(half)
    del half
    assert torch.equal(logits(twin, prompt()), expected)


def test_is_one_node_of_a_graph(half: Any) -> None:
    module = next(hybrid_experts(half))
    batch = torch.randn(5, 64).bfloat16(), torch.randint(0, 8, (5, 3)), torch.rand(5, 3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*batch), module(*batch))


def test_calls_as_of_any_experts_module(half: Any) -> None:
    """Dtypes, ids of no expert, fewer experts than usual, shapes; errors by name."""
    module = next(hybrid_experts(half))
    x, ids = torch.randn(2, 2, 64), torch.tensor([[0, 7, 3], [1, 2, 4], [5, 6, 0], [3, 1, 2]])
    weights = torch.rand(4, 3)
    expected = module(x.bfloat16(), ids, weights)
    assert module(x, ids.int(), weights.double()).dtype == torch.float32
    assert torch.equal(module(x, ids, weights).bfloat16(), expected)
    none = torch.tensor([[8, -1, 8]] * 4)
    assert not module(x, none, weights).any()
    one = module(x, ids[:, :1], weights[:, :1])
    assert torch.equal(one, module(x, torch.cat([ids[:, :1], none[:, :2]], 1), weights))
    with pytest.raises(ValueError, match=r"experts .*4 experts per token, .* says 3"):
        module(x, torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"ids \(3, 3\) and weights"):
        module(x, ids[:3], weights)
    with pytest.raises(RuntimeError, match="inference only"):
        module(x.requires_grad_(), ids, weights).sum().backward()


def test_hit_rates(half: Any, folder: Path) -> None:
    """Counted on real routing, and their sentence."""
    routed: list[torch.Tensor] = []
    modules = list(hybrid_experts(half))
    hooks = [m.register_forward_pre_hook(lambda m, args: routed.append(args[1])) for m in modules]
    before = hit_rates(half)
    assert before is not None
    logits(half, prompt())
    for hook in hooks:
        hook.remove()
    found = hit_rates(half)
    assert found is not None
    assert (found - before).layers == {
        layer: (int((ids < 4).sum()), ids.numel()) for layer, ids in enumerate(routed)
    }
    assert hit_rates(load(folder, "MXFP4")) is None
    assert HitRates({0: (1, 4), 3: (3, 4), 5: (0, 0)}).summary() == (
        "hot experts took 50.0 % of 8 calls; by layer 25.0 % at least, 50.0 % on average, "
        "75.0 % at most"
    )
    assert HitRates({0: (0, 0)}).summary() == "no expert was used"


def test_experts_go_straight_to_their_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` reads each expert once, and none of its weights through torch."""
    read: list[tuple[int, int]] = []
    real = LayerSource.expert

    def expert(self: Any, number: int, *args: Any) -> Any:
        read.append((self.layer, number))
        return real(self, number, *args)

    monkeypatch.setattr(LayerSource, "expert", expert)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all of torch's work on this thread
    with ExpertShapes(intermediate=96) as seen:
        model = from_pretrained(folder, "BF16", threads=1, progress=False, **HALF)
    assert seen.count == 0
    assert sorted(read) == [(layer, number) for layer in range(2) for number in range(8)]
    assert not any(p.is_meta for p in model.parameters())
