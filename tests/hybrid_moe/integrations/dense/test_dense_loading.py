"""`from_pretrained(dense=...)`: dense tensors go from the files into strips, as they should be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import HybridMLP
from hybrid_moe.integrations.transformers.dense.stored_linear import e4m3_values
from hybrid_moe.integrations.transformers.dense.weight import PackedWeight
from hybrid_moe.integrations.transformers.options import dense_format
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload
from hybrid_moe.loaders import SafetensorsIndex
from hybrid_moe.logs import warn_once
from tests.hybrid_moe.checkpoints import FILE, edit_config, edit_tensors, save
from tests.hybrid_moe.integrations.dense.wide_models import WIDE, build_wide
from tests.hybrid_moe.integrations.loading_cases import load, plain
from tests.hybrid_moe.tiny_models import logits, prompt

DENSE = [*(name.lower() for name in DENSE_FORMATS), "torch"]
"""The choices, as a message lists them."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, written once, not to be changed."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = save(build_wide(family), tmp_path_factory.mktemp(family))
        return folders[family]

    return folder


@pytest.fixture(autouse=True)
def _said_again() -> None:
    """What is said once in a process is said once in a test."""
    warn_once.cache_clear()


def offloaded(folder: Path, dense: str = "bf16") -> Any:
    return offload(plain(folder), "BF16", threads=1, dense=dense, progress=False)


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        *((family, "bf16") for family in WIDE),
        *(("qwen3_moe", dense) for dense in DENSE if dense != "bf16"),
    ],
)
def test_equals_offload_of_what_transformers_loads(
    checkpoint: Callable[[str], Path], family: str, dense: str
) -> None:
    folder = checkpoint(family)
    model, other = load(folder, dense=dense), offloaded(folder, dense)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))
    assert model.state_dict().keys() == other.state_dict().keys()
    kinds = [{n: type(m) for n, m in each.named_modules()} for each in (model, other)]
    assert kinds[0] == kinds[1]
    packed = {m.matrix.fmt.name for m in model.modules() if isinstance(m, HybridLinear)}
    packed |= {m.layer.fmt.name for m in model.modules() if isinstance(m, HybridMLP)}
    assert packed == (set() if dense == "torch" else {dense.upper()})


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes of all tensors with values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            packed = isinstance(tensor, PackedWeight)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not packed:
                self.seen.add(tuple(tensor.shape))
        return result


def test_dense_layers_never_pass_through_torch(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor with values has the shape of a weight."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all of torch's work on this thread
    folder = checkpoint("deepseek_v3")
    own = {(64 + 16, 64), (4 * 32, 64), (64, 4 * 32), (4 * 48, 64), (96, 64), (64, 96)}
    with Shapes() as control:
        load(folder, dense="torch")
    assert own <= control.seen
    with Shapes() as shapes:
        load(folder)
    assert not own & shapes.seen


def test_rows_are_read_some_at_a_time(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 64 rows, on several threads, give the same bits; MLPs come before the rest."""
    folder = checkpoint("deepseek_v3")
    expected = logits(load(folder), prompt())
    monkeypatch.setattr("hybrid_moe.integrations.transformers.dense.packing.PART_BYTES", 1)
    seen: list[tuple[str, int]] = []
    read = SafetensorsIndex.read

    def noted(self: Any, key: str, rows: slice | None = None, out: Any = None) -> Any:
        if rows is not None:
            seen.append((key, rows.stop - rows.start))
        return read(self, key, rows, out)

    monkeypatch.setattr(SafetensorsIndex, "read", noted)
    model = from_pretrained(folder, "BF16", threads=2, pools=1, progress=False)
    assert torch.equal(logits(model, prompt()), expected)
    of_mlps = [".mlp." in key for key, _ in seen if ".experts." not in key]
    assert of_mlps == sorted(of_mlps, reverse=True) and 0 < sum(of_mlps) < len(of_mlps)
    assert max(n for key, n in seen if "self_attn" in key) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_floats_are_rounded_to_bf16_and_said(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(build_wide("gpt_oss", dtype), tmp_path)
    model = load(folder)
    name = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    assert f"9 dense layers are stored as {name}: rounded to BF16" in caplog.text
    stored = load_file(folder / FILE)
    for key, tensor in stored.items():
        if "self_attn" in key and key.endswith("proj.weight"):
            held = model.get_submodule(key.removesuffix(".weight"))
            assert held.weight.dtype == dtype
            assert torch.equal(held.weight.bfloat16(), tensor.bfloat16())
    caplog.clear()
    offload(plain(folder), "BF16", threads=1, progress=False)
    assert f"9 dense layers are stored as {str(dtype)[6:]}: rounded to BF16" in caplog.text


def test_e4m3_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), expected)
    negative_zero = 0x80
    assert np.signbit(e4m3_values()[negative_zero])


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_are_dequantised_as_transformers_does(
    scales: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(build_wide("deepseek_v3"), tmp_path)
    tensors, block = load_file(folder / FILE), (32, 16)
    generator = torch.Generator().manual_seed(0)
    quantised = [k for k in tensors if k.endswith("_proj.weight") and ".experts." not in k]
    for key in quantised:
        rows, inputs = tensors[key].shape
        tensors[key] = (tensors[key].float() * 64).to(torch.float8_e4m3fn)
        shape = (rows // block[0], inputs // block[1])
        scale = torch.exp2(torch.randint(-8, -4, shape, generator=generator).float())
        if scales is not torch.float8_e8m0fnu:
            scale *= 1.25
        tensors[key.replace(".weight", ".weight_scale_inv")] = scale.to(scales)
    save_file(tensors, folder / FILE, {"format": "pt"})
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block,
            "modules_to_not_convert": ["lm_head", "kv_a_proj_with_mqa", ".experts"],
        },
    )  # fmt: skip
    model = load(folder)
    assert f"{len(quantised)} dense layers are stored as FP8: dequantised to BF16" in caplog.text
    other = offloaded(folder)
    assert torch.equal(logits(model, prompt()), logits(other, prompt()))


def test_what_transformers_converts_is_packed_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ernie's and Minimax's keys are renamed, these here are halves of one tensor: a converter
    that the user registers."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import Chunk, WeightConverter

    folder = save(build_wide("gpt_oss"), tmp_path)
    expected = logits(load(folder), prompt())
    tensors = load_file(folder / FILE)
    for layer in (0, 1):
        stem = f"model.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            halves = [tensors.pop(f"{stem}{p}_proj.{kind}") for p in "kv"]
            tensors[f"{stem}kv_proj.{kind}"] = torch.cat(halves)
    save_file(tensors, folder / FILE, {"format": "pt"})
    before = get_checkpoint_conversion_mapping("gpt_oss")
    converters = [
        WeightConverter(
            f"self_attn.kv_proj.{kind}",
            [f"self_attn.k_proj.{kind}", f"self_attn.v_proj.{kind}"],
            [Chunk(dim=0)],
        )
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping("gpt_oss", converters, overwrite=True)
    try:
        model = load(folder)
        model.save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "modules", save_original_format=False)
    finally:
        register_checkpoint_conversion_mapping("gpt_oss", before, overwrite=True)
    assert "4 dense layers (model.layers.0.self_attn.k_proj, ...) are not stored" in caplog.text
    assert torch.equal(logits(model, prompt()), expected)
    assert isinstance(model.model.layers[0].self_attn.k_proj, HybridLinear)
    saved = load_file(tmp_path / "saved" / FILE)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensors[key]) for key in tensors)
    assert torch.equal(logits(load(tmp_path / "modules"), prompt()), expected)


def test_the_user_s_key_mapping_is_followed(tmp_path: Path) -> None:
    folder = save(build_wide("qwen3_moe"), tmp_path)
    expected = logits(load(folder), prompt())
    tensors = load_file(folder / FILE)
    renamed = {k.replace("self_attn", "attention"): t for k, t in tensors.items()}
    save_file(renamed, folder / FILE, {"format": "pt"})
    model = load(folder, key_mapping={r"\.attention\.": ".self_attn."})
    assert torch.equal(logits(model, prompt()), expected)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("model.layers.0.self_attn.k_proj.weight", None, "lacks model.layers.0.self_attn.k_proj"),
        ("model.layers.1.mlp.up_proj.weight", None, "lacks model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight", (96, 64), "another shape .*mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", (1, 1), "no place for: .*q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "no place for: .*q_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    key: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    folder = save(build_wide("qwen3_moe"), tmp_path)
    if key in load_file(folder / FILE):
        edit_tensors(folder, drop=key)
    if shape is not None:
        edit_tensors(folder, add={key: torch.zeros(shape, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_embedding_that_is_tied_in_name_only(tmp_path: Path) -> None:
    """Both are stored: as one if they are the same, else as two, as Transformers does."""
    folder = save(build_wide("qwen3_moe"), tmp_path)
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    edit_tensors(folder, add={"lm_head.weight": embedding.clone()})
    same = load(folder)
    assert same.model.embed_tokens.weight is same.lm_head.weight
    edit_tensors(folder, add={"lm_head.weight": embedding * 2})
    different, reference = load(folder), plain(folder)
    assert type(different.model.embed_tokens) is torch.nn.Embedding
    assert torch.equal(different.lm_head.weight, 2 * embedding)
    offload(reference, "BF16", threads=1, progress=False)
    assert torch.equal(logits(different, prompt()), logits(reference, prompt()))


def test_a_head_alone_is_stored(tmp_path: Path) -> None:
    folder = save(build_wide("qwen3_moe"), tmp_path)
    expected = logits(load(folder), prompt())
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    edit_tensors(folder, drop="model.embed_tokens.weight", add={"lm_head.weight": embedding})
    assert torch.equal(logits(load(folder), prompt()), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device_map": {"": "cpu"}}, None),
        ({"device_map": "cpu"}, None),
        ({"device_map": "auto"}, "device_map='auto'"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map="),
    ],
)
def test_where_the_model_is_placed(
    checkpoint: Callable[[str], Path], options: dict[str, Any], reason: str | None,
    caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    """Layers that are not on the CPU, or have accelerate's hooks, stay with torch."""
    model = load(checkpoint("gpt_oss"), **options, offload_folder=tmp_path)
    packed = any(isinstance(m, HybridLinear) for m in model.modules())
    assert packed is (reason is None)
    assert ("dense layers stay with torch" in caplog.text) is (reason is not None)
    assert (reason or "") in caplog.text


def test_unknown_formats_are_refused_before_anything_is_loaded(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_moe.integrations.transformers.loading.load_skeleton", pytest.fail)
    choices = ", ".join(DENSE)
    with pytest.raises(ValueError, match=f"dense is 'int3': choices are {choices}"):
        load(checkpoint("gpt_oss"), dense="int3")
    model = build_wide("gpt_oss")
    with pytest.raises(ValueError, match="dense is 'int3'"):
        offload(model, dense="int3")
    assert not any(isinstance(m, HybridLinear) for m in model.modules())
    assert dense_format("torch") is None and dense_format("BF16") is DENSE_FORMATS["BF16"]


def test_offload_frees_one_layer_after_the_other() -> None:
    import weakref

    model = build_wide("deepseek_v3")
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    gone = [weakref.ref(p) for linear in linears for p in linear.parameters()]
    count = len(linears)
    del linears
    offload(model, "BF16", threads=1, progress=False)
    assert count == 2 * 5 + 2 * 3 + 1 and all(ref() is None for ref in gone)


def test_what_stays_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hybrid_moe"):
        offload(build_wide("afmoe"), "BF16", threads=1, progress=False)
    (record,) = [r for r in caplog.records if "stay with torch" in r.getMessage()]
    assert "1 model.layers.*.mlp.router.gate (router, 12.0 KiB)" in record.getMessage()
    assert record.levelno == logging.INFO  # little: nothing to warn of


def test_float32_layers_of_a_bf16_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformers keeps in float32 keeps its arithmetic."""
    monkeypatch.setattr(
        transformers.Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"}, raising=False
    )
    folder = save(build_wide("qwen3_moe"), tmp_path)
    for model in (load(folder), offloaded(folder)):
        attention = model.model.layers[0].self_attn
        assert type(attention.o_proj) is torch.nn.Linear
        assert attention.o_proj.weight.dtype == torch.float32
        assert isinstance(attention.q_proj, HybridLinear)
