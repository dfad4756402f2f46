"""`from_pretrained`: checkpoints of each family, what it reads, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hybrid_moe.formats import FORMATS
from hybrid_moe.integrations.hybrid_experts import HybridExperts
from hybrid_moe.integrations.loading import drop_experts_quantization, layer_index
from hybrid_moe.integrations.transformers import from_pretrained, offload
from hybrid_moe.loaders import convert_checkpoint
from hybrid_moe.tensors import CheckpointError
from tests.hybrid_moe.checkpoints import FILE, edit_config, edit_tensors, save, to_mxfp4
from tests.hybrid_moe.tiny_models import FAMILIES, build, logits, prompt

FAMILY = pytest.mark.parametrize("family", FAMILIES)
METHOD = pytest.mark.parametrize("method", FORMATS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A checkpoint of the tiny Qwen3-MoE."""
    return save(build("qwen3_moe"), tmp_path / "qwen")


def load(directory: Path, method: str | None = "BF16", **kwargs: Any) -> Any:
    return from_pretrained(directory, method, threads=1, progress=False, **kwargs)


def plain(directory: Path) -> Any:
    """What Transformers makes of the checkpoint."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@FAMILY
@METHOD
def test_equals_offload_of_what_transformers_loads(
    family: str, method: str, tmp_path: Path
) -> None:
    directory = save(build(family), tmp_path)
    model, other = load(directory, method), plain(directory)
    offload(other, method, threads=1, progress=False)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))
    assert type(model) is type(other)
    assert model.state_dict().keys() == other.state_dict().keys()


@FAMILY
def test_published_mxfp4_equals_quantised_bf16(family: str, tmp_path: Path) -> None:
    directory = save(build(family), tmp_path / "bf16")
    expected = logits(load(directory, "MXFP4"), prompt())
    published = load(to_mxfp4(directory, family), None)
    assert torch.equal(logits(published, prompt()), expected)
    assert {m.fmt and m.fmt.name for m in hybrid_experts(published)} == {"MXFP4"}


@FAMILY
def test_converted_equals_quantised_bf16(family: str, tmp_path: Path) -> None:
    directory = save(build(family), tmp_path / "bf16")
    convert_checkpoint(directory, tmp_path / "mxfp4", "MXFP4", progress=False, threads=1)
    expected = logits(load(directory, "MXFP4"), prompt())
    assert torch.equal(logits(load(tmp_path / "mxfp4", None), prompt()), expected)


def test_deepseek_v4_without_prefix_and_with_draft_layers(tmp_path: Path) -> None:
    """The published index: no `model.` before `layers.`, and `mtp.` layers that stay unread."""
    directory = to_mxfp4(save(build("deepseek_v4"), tmp_path), "deepseek_v4")
    expected = logits(load(directory, None), prompt())
    tensors = {k.removeprefix("model."): t for k, t in load_file(directory / FILE).items()}
    tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    save_file(tensors, directory / FILE, {"format": "pt"})
    assert torch.equal(logits(load(directory, None), prompt()), expected)


def test_quantization_of_experts_is_not_transformers_business() -> None:
    config = FAMILIES["gpt_oss"]()
    for method in ("mxfp4", "quark", "fp8"):  # the name does not decide
        config.quantization_config = {"quant_method": method}
        drop_experts_quantization(config, only_experts=True)
        assert not hasattr(config, "quantization_config")
    config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    drop_experts_quantization(config, only_experts=False)
    kept = config.quantization_config
    assert kept == {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", ".experts"]}


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def hybrid_experts(model: Any) -> Iterator[HybridExperts]:
    return (m for m in model.modules() if isinstance(m, HybridExperts))


class ExpertShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors with storage that have a dimension of the experts' intermediate size."""

    def __init__(self, intermediate: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes, self.count = {intermediate, 2 * intermediate}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.count += bool(self.sizes & set(tensor.shape))
        return result


def test_experts_never_pass_through_torch(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all of torch's work on this thread
    with ExpertShapes(intermediate=96) as control:
        plain(qwen)
    assert control.count > 0
    with ExpertShapes(intermediate=96) as seen:
        model = load(qwen)
    assert seen.count == 0
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


def test_a_tensor_without_a_place_is_named(qwen: Path) -> None:
    edit_tensors(qwen, add={"model.layers.0.mlp.surprise.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no place for: .*layers\.0\.mlp\.surprise"):
        load(qwen)


def test_experts_of_a_layer_too_many_are_named(qwen: Path) -> None:
    edit_config(qwen, num_hidden_layers=1, layer_types=None)
    with pytest.raises(CheckpointError, match=r"no place for: .*layers\.1\."):
        load(qwen)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.0.mlp.experts.2.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(qwen: Path, key: str) -> None:
    edit_tensors(qwen, drop=key)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(qwen)


def test_a_tensor_of_another_shape_is_named(qwen: Path) -> None:
    key = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(qwen, drop=key)
    edit_tensors(qwen, add={key: torch.zeros(64, 32, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"another shape .*self_attn\.o_proj\.weight"):
        load(qwen)


@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 9), ("moe_intermediate_size", 128), ("hidden_size", 96)]
)
def test_experts_that_the_config_does_not_describe(qwen: Path, name: str, value: int) -> None:
    edit_config(qwen, **{name: value})
    with pytest.raises(CheckpointError):
        load(qwen)


def test_biases_must_be_there(tmp_path: Path) -> None:
    directory = save(build("gpt_oss"), tmp_path)
    for layer in (0, 1):
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            edit_tensors(directory, drop=f"model.layers.{layer}.mlp.experts.{name}")
    with pytest.raises(CheckpointError):
        load(directory)


def test_mxfp4_does_not_become_bf16(qwen: Path) -> None:
    with pytest.raises(ValueError, match="MXFP4"):
        load(to_mxfp4(qwen, "qwen3_moe"), "BF16")


def test_bad_arguments(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load(qwen / "config.json")
    with pytest.raises(ValueError, match="unknown method 'INT3'"):
        load(qwen, "INT3")
    with pytest.raises(ValueError, match="threads"):
        from_pretrained(qwen, threads=100_000)
    with pytest.raises(ValueError, match="experts_implementation"):
        load(qwen, experts_implementation="eager")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    save(transformers.LlamaForCausalLM(config), tmp_path)
    with pytest.raises(CheckpointError, match="no routed experts"):
        load(tmp_path)


def test_layer_index() -> None:
    assert layer_index("model.layers.12.mlp.experts") == 12
    with pytest.raises(NotImplementedError, match="block"):
        layer_index("block.experts")


REGISTRATION = """
import sys
import hybrid_moe
assert "transformers" not in sys.modules and "torch" not in sys.modules, "the import is not lazy"
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS and "hybrid_moe" in ALL_FP8_EXPERTS_FUNCTIONS
"""

REGISTRATION_AFTER = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "hybrid_moe" not in ALL_EXPERTS_FUNCTIONS
import hybrid_moe
assert "hybrid_moe" in ALL_EXPERTS_FUNCTIONS
from transformers.integrations import finegrained_fp8
assert "hybrid_moe" in finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
assert "exec_module" not in vars(finegrained_fp8.__spec__.loader), "the loader is not restored"
"""


@pytest.mark.parametrize("program", [REGISTRATION, REGISTRATION_AFTER])
def test_importing_hybrid_moe_registers_the_name(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_experts_implementation_of_transformers(qwen: Path) -> None:
    import hybrid_moe  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(
        qwen, experts_implementation="hybrid_moe"
    )
    assert torch.equal(logits(model, prompt()), logits(load(qwen), prompt()))
