"""`experts_implementation="hybrid_moe"` where it could do nothing, or be told something strange."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils import parametrize

from hybrid_moe.integrations.transformers import guard
from hybrid_moe.integrations.transformers.experts_module import find_experts
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload, register
from hybrid_moe.logs import warn_once
from tests.hybrid_moe.tiny_models import COMMON, build, logits, offload_experts, prompt

NAMED = {"experts_implementation": "hybrid_moe"}
AutoModel = transformers.AutoModelForCausalLM
TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def llama4(**options: Any) -> Any:
    return transformers.Llama4TextConfig(
        **COMMON, head_dim=16, intermediate_size=64, intermediate_size_mlp=64, num_local_experts=2,
        num_experts_per_tok=1, interleave_moe_layer_step=1, **options,
    )  # fmt: skip


REFUSED = r"Llama4TextExperts \(.*feed_forward\.experts.*is not supported.*Qwen-MoE"


def test_offload_names_experts_that_transformers_does_not_dispatch() -> None:
    model = AutoModel.from_config(llama4())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=REFUSED):
        offload(model, "BF16", threads=1, progress=False)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("way", ["from_pretrained", "config", "from_config", "class", "select"])
def test_the_name_is_refused_for_experts_that_are_not_dispatched(way: str, tmp_path: Path) -> None:
    model = AutoModel.from_config(llama4())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        if way == "from_pretrained":
            AutoModel.from_pretrained(tmp_path, **NAMED)
        elif way == "config":
            AutoModel.from_pretrained(tmp_path, config=llama4(**NAMED))
        elif way == "from_config":
            AutoModel.from_config(llama4(**NAMED))
        elif way == "class":
            transformers.Llama4ForCausalLM(llama4(**NAMED))
        else:
            model.set_experts_implementation("hybrid_moe")
    assert model.config._experts_implementation != "hybrid_moe"
    assert logits(model, prompt()).isfinite().all()  # as it was


def test_lists_of_experts_are_named_by_the_class_of_one() -> None:
    class Expert(torch.nn.Linear):
        pass

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([Expert(2, 2), Expert(2, 2)])
            self.shared_experts = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Block: Expert \(experts\) is not supported"):
        offload(Block(), progress=False)


def test_a_model_of_both_kinds_runs_and_says_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = build("qwen3_moe")
    model.extra_experts = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
    with caplog.at_level(logging.WARNING):
        model.set_experts_implementation("hybrid_moe")
        model.set_experts_implementation("eager")
        model.set_experts_implementation("hybrid_moe")
    said = [r.getMessage() for r in caplog.records if "is not supported" in r.getMessage()]
    assert len(said) == 1 and "Linear (extra_experts.experts)" in said[0]


def test_models_without_experts_and_other_names_pass() -> None:
    config = transformers.LlamaConfig(**COMMON, intermediate_size=64, **NAMED)
    AutoModel.from_config(config).set_experts_implementation("hybrid_moe")
    AutoModel.from_config(llama4(experts_implementation="eager"))


def test_offloaded_models_may_be_told_the_name_again() -> None:
    model = offload(build("qwen3_moe"), "BF16", threads=1, progress=False)
    model.set_experts_implementation("eager")
    model.set_experts_implementation("hybrid_moe")
    assert logits(model, prompt()).isfinite().all()


def test_the_guard_is_put_in_once() -> None:
    loaded = transformers.PreTrainedModel.__dict__["from_pretrained"].__func__
    assert guard.guard(transformers.modeling_utils)
    assert transformers.PreTrainedModel.__dict__["from_pretrained"].__func__ is loaded
    assert loaded.__doc__ and loaded.__name__ == "from_pretrained"


# Checkpoints ---------------------------------------------------------------------------------


def converted(folder: Path, **config: Any) -> Path:
    """The repository's MXFP4 checkpoint with other entries in its configuration."""
    shutil.copytree(TINY, folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    return folder


MXFP4_REFUSED = r"stores its experts as MXFP4.*BF16 only.*hybrid_moe\.from_pretrained\('"


@pytest.mark.parametrize("way", ["argument", "config", "class", "subfolder", "variant"])
@pytest.mark.parametrize("quantization", [{}, {"quantization_config": {"quant_method": "unheard"}}])
def test_mxfp4_checkpoints_are_refused_by_name(
    way: str, quantization: dict[str, Any], tmp_path: Path
) -> None:
    folder = converted(tmp_path / "inner", **quantization)
    with pytest.raises(NotImplementedError, match=MXFP4_REFUSED):
        if way == "argument":
            AutoModel.from_pretrained(folder, **NAMED)
        elif way == "config":
            config = transformers.AutoConfig.from_pretrained(folder, **NAMED)
            AutoModel.from_pretrained(str(folder), config=config)
        elif way == "class":
            transformers.Qwen3MoeForCausalLM.from_pretrained(folder, **NAMED)
        elif way == "subfolder":
            AutoModel.from_pretrained(tmp_path, subfolder="inner", **NAMED)
        else:
            (folder / "model.safetensors").rename(folder / "model.int4.safetensors")
            build("qwen3_moe").save_pretrained(folder / "plain")
            (folder / "plain" / "model.safetensors").rename(folder / "model.safetensors")
            AutoModel.from_pretrained(folder, variant="int4", **NAMED)


def test_mxfp4_checkpoints_in_the_hub_s_cache_are_refused_by_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    converted(snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    with pytest.raises(NotImplementedError, match=MXFP4_REFUSED):
        AutoModel.from_pretrained("some/model", cache_dir=tmp_path, local_files_only=True, **NAMED)


def test_what_transformers_can_read_is_read(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "bf16")
    loaded = AutoModel.from_pretrained(tmp_path / "bf16", **NAMED)
    offload_experts(model, "BF16")
    assert torch.equal(logits(loaded, prompt()), logits(model, prompt()))


def test_our_own_loading_passes_the_guard() -> None:
    model = from_pretrained(TINY, threads=1, progress=False)
    assert any(isinstance(m, HybridExperts) for m in model.modules())


def test_errors_of_other_models_stay_transformers_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        AutoModel.from_pretrained(tmp_path / "nowhere", **NAMED)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(TINY, experts_implementation="eager")


# Adapters ------------------------------------------------------------------------------------


class LoraParametrization(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        E, rows, columns = weight.shape
        self.a = torch.nn.Parameter(torch.full((E, 2, columns), 0.02, dtype=weight.dtype))
        self.b = torch.nn.Parameter(torch.full((E, rows, 2), 0.02, dtype=weight.dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class Wrapper(torch.nn.Module):
    """As peft's layers are: the module in `base_layer`, adapters beside it."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.zeros(2))})

    def forward(self, *args: torch.Tensor) -> Any:
        return self.base_layer(*args)


def adapt(model: Any, kind: str) -> None:
    mlp = model.model.layers[1].mlp
    if kind == "parametrized":
        weight = mlp.experts.down_proj
        parametrize.register_parametrization(mlp.experts, "down_proj", LoraParametrization(weight))
    elif kind == "wrapped":
        mlp.experts = Wrapper(mlp.experts)
    elif kind == "wrapped twice":
        mlp.experts = Wrapper(Wrapper(mlp.experts))
    elif kind == "block wrapped":
        model.model.layers[1].mlp = Wrapper(mlp)
    elif kind == "parameter inside":
        mlp.experts.lora_A = torch.nn.Parameter(torch.zeros(2))
    else:
        mlp.experts.adapter = torch.nn.Linear(2, 2)


KINDS = [
    "parametrized", "wrapped", "wrapped twice", "block wrapped", "parameter inside",
    "module inside",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_experts_are_refused_before_anything_is_moved(kind: str) -> None:
    model = build("qwen3_moe")
    adapt(model, kind)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"layers\.1\.mlp.*adapters.*merge"):
        offload(model, "BF16", threads=1, progress=False)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert len(find_experts(model)) == 2


def test_adapters_elsewhere_are_none_of_our_business() -> None:
    model = build("qwen3_moe")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Wrapper(attention.q_proj)
    offload(model, "BF16", threads=1, progress=False)
    assert logits(model, prompt()).isfinite().all()


def test_the_registered_name_runs_parametrized_experts_as_they_are() -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation("hybrid_moe")
    before = logits(model, prompt())
    adapt(model, "parametrized")
    adapted = logits(model, prompt())
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.parametrizations.down_proj[0].a.data.mul_(-3)
    changed = logits(model, prompt())
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=True)
    offload_experts(model, "BF16")
    assert torch.equal(logits(model, prompt()), changed)
    assert not torch.equal(before, adapted) and not torch.equal(adapted, changed)


def test_unknown_parameters_are_refused_by_name() -> None:
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(NotImplementedError, match=r"layers\.0.*parameters temperature"):
        offload(model, "BF16", threads=1, progress=False)
    model.set_experts_implementation("hybrid_moe")
    with pytest.raises(NotImplementedError, match="parameters temperature"):
        logits(model, prompt())
