"""`from_pretrained`: what it loads is what Transformers loads, and experts go past torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.experts_module import experts_spec, find_experts
from hybrid_moe.integrations.transformers.loading import (
    experts_source,
    layer_index,
)
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload, register
from hybrid_moe.loaders import Checkpoint, convert_checkpoint
from tests.families import write_family
from tests.hybrid_moe.checkpoints import edit_config, save, to_mxfp4
from tests.hybrid_moe.integrations.loading_cases import hybrid_experts, load, plain
from tests.hybrid_moe.tiny_models import FAMILIES, build, logits, prompt
from tests.loaders.test_families import assert_is_expert

FAMILY = pytest.mark.parametrize("family", FAMILIES)
METHOD = pytest.mark.parametrize("method", DENSE_FORMATS)


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
    assert {m.formats and m.formats.name for m in hybrid_experts(published)} == {"MXFP4"}


@FAMILY
def test_converted_equals_quantised_bf16(family: str, tmp_path: Path) -> None:
    directory = save(build(family), tmp_path / "bf16")
    convert_checkpoint(directory, tmp_path / "mxfp4", "MXFP4", progress=False, threads=1)
    expected = logits(load(directory, "MXFP4"), prompt())
    assert torch.equal(logits(load(tmp_path / "mxfp4", None), prompt()), expected)


def test_the_module_decides_where_gate_and_up_lie(tmp_path: Path) -> None:
    """Biased experts in halves, under the names of gpt-oss's alternating ones."""
    fixture = write_family("privacy_filter", tmp_path)
    (fixture.directory / "config.json").unlink()  # nobody else could tell
    model = transformers.AutoModelForTokenClassification.from_config(fixture.config)
    checkpoint = Checkpoint.open(fixture.directory)
    for name, module in find_experts(model).items():
        source = experts_source({}, checkpoint, name, experts_spec(module, name))
        layer = fixture.layers[source.layer]
        for expert in range(fixture.num_experts):
            assert_is_expert(source.expert(expert), layer, expert)


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


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


def test_layer_index() -> None:
    assert layer_index("model.layers.12.mlp.experts") == 12
    with pytest.raises(NotImplementedError, match="block"):
        layer_index("block.experts")


def test_experts_implementation_of_transformers(qwen: Path) -> None:
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        qwen, experts_implementation="hybrid_moe"
    )
    loaded = load(qwen, dense="torch", attn_implementation="sdpa")
    assert torch.equal(logits(model, prompt()), logits(loaded, prompt()))


@pytest.mark.parametrize("excess", [1, None], ids=["one more", "none"])
def test_a_token_takes_no_more_experts_than_there_are(excess: int | None, tmp_path: Path) -> None:
    config = build("qwen3_moe").config
    folder, experts = save(build("qwen3_moe"), tmp_path), config.num_experts
    taken = 0 if excess is None else experts + excess
    message = f"lets a token take {taken} experts of {experts}: .* between 1 and {experts}"
    edit_config(folder, num_experts_per_tok=taken)
    with pytest.raises(CheckpointError, match=rf"config\.json of .*{tmp_path.name} {message}"):
        from_pretrained(folder, threads=1, progress=False)
    # a configuration that is given counts in its place
    assert from_pretrained(folder, threads=1, progress=False, config=config)
    config.num_experts_per_tok = taken
    with pytest.raises(CheckpointError, match=f"^the configuration {message}"):
        from_pretrained(folder, threads=1, progress=False, config=config)
