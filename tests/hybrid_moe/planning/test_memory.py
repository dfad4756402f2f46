"""What the plan says of memory is what then happens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.table import FORMATS, format_named
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import HybridMLP
from hybrid_moe.integrations.transformers.dense.packing import nbytes_of
from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.loaders import inspect_checkpoint
from hybrid_moe.loaders.model_config import ModelConfig
from hybrid_moe.planning import make_plan, read_model
from hybrid_moe.planning.kv_cache import sglang_cache, transformers_cache
from hybrid_moe.planning.machine import huge_pages_here
from hybrid_moe.planning.scratch import cpu_buffers, job_nbytes
from tests.families import FAMILIES, write_family
from tests.hybrid_moe.planning.cases import expert_ram, request
from tests.hybrid_moe.planning.fake_checkpoints import MODELS, write_headers
from tests.hybrid_moe.planning.resident import wrappers

TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"
TOLERANCE = 0.03
LARGER = {
    "num_hidden_layers": 5, "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 24,
    "num_experts_per_tok": 2, "vocab_size": 256,
}  # fmt: skip
"""100 MB of MXFP4 experts. All weights are zero, which is a valid one: scales are 2^-127."""


FORMAT = st.sampled_from([fmt for fmt in FORMATS.values() if has_kernels(fmt)])


@given(
    formats=st.builds(LayerFormats, FORMAT, FORMAT),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    pools=st.integers(1, 2),
    biases=st.booleans(),
)
def test_an_expert_is_as_large_as_its_panels(
    formats: LayerFormats, sizes: tuple[int, int], pools: int, biases: bool
) -> None:
    """Of every format, and of any two."""
    # up to 40 groups of 32 each, or of the format's own
    hidden, intermediate = (
        -(-32 * n // fmt.k_multiple) * fmt.k_multiple for n, fmt in zip(sizes, formats, strict=True)
    )
    layer = ExpertLayer(formats, 1, hidden, intermediate, pool=PoolConfig(pools, pools))
    layer.allocate(np.ones(1, bool), biases=biases)
    predicted = packed_nbytes(formats, hidden, intermediate)
    if biases:
        predicted += bias_nbytes(hidden, intermediate)
    assert predicted == layer.nbytes == sum(layer.expert_nbytes(pool) for pool in range(pools))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_resident_expert_is_as_large_as_a_stored_one(fmt: WeightFormat) -> None:
    """At most 2 % more, in the dimensions of DeepSeek-V4-Flash and of gpt-oss, where they fit."""
    for hidden, intermediate in ((4096, 2048), (2880, 2880)):
        if hidden % fmt.k_multiple == 0 == intermediate % fmt.k_multiple:
            stored = 2 * fmt.nbytes(intermediate, hidden) + fmt.nbytes(hidden, intermediate)
            assert stored <= packed_nbytes(fmt, hidden, intermediate) <= 1.02 * stored


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with as many bytes as it says, all of them zero."""
    model = MODELS["Qwen3-30B-A3B-MXFP4"]
    return write_headers(tmp_path_factory.mktemp("larger"), model, LARGER)


def measure(model: Path, method: str, huge_pages: bool) -> dict[str, int]:
    """Memory that `resident` reports, in a process of its own."""
    arguments = (TINY, model, method, "huge" if huge_pages else "small")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hybrid_moe.planning.resident", *map(str, arguments)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("huge_pages", [False, True])
def test_ram_of_a_larger_checkpoint(larger: Path, huge_pages: bool) -> None:
    """Arenas and the process's resident set, within 3%."""
    if huge_pages and not huge_pages_here():
        pytest.skip("no huge pages on this machine")
    plan = make_plan(read_model(larger), request(huge_pages=huge_pages))
    assert expert_ram(plan) > 90e6
    actual = measure(larger, "MXFP4", huge_pages)
    assert expert_ram(plan) == pytest.approx(actual["arenas"], rel=TOLERANCE)
    assert expert_ram(plan) == pytest.approx(actual["growth"], rel=TOLERANCE)


@pytest.mark.parametrize("method", ["FP8", pytest.param("AMXINT4", marks=pytest.mark.full)])
def test_ram_of_other_formats(method: str, tmp_path: Path) -> None:
    """Held as they are stored, and quantized while they are loaded."""
    if not has_kernels(format_named(method)):
        pytest.skip(f"no kernels of {method}")
    model = MODELS["Qwen3-30B-A3B-FP8" if method == "FP8" else "Qwen3-30B-A3B"]
    sizes = {**LARGER, "num_hidden_layers": 1}
    checkpoint = write_headers(tmp_path, model, sizes)
    plan = make_plan(read_model(checkpoint, method=method), request(huge_pages=False))
    assert expert_ram(plan) > 18e6
    actual = measure(checkpoint, method, False)
    assert expert_ram(plan) == pytest.approx(actual["arenas"], rel=TOLERANCE)


def test_ram_of_the_small_model() -> None:
    """Arenas alone: 3 MB are lost in what a process takes and gives back."""
    plan = make_plan(read_model(TINY), request(huge_pages=False, context=64))
    assert expert_ram(plan) == pytest.approx(measure(TINY, "MXFP4", False)["arenas"], rel=TOLERANCE)


def test_biases_are_counted(tmp_path: Path) -> None:
    fixture = write_family("gpt_oss_mxfp4", tmp_path)
    model = read_model(fixture.directory)
    plan = make_plan(model, request(huge_pages=False, context=64))
    layer = model.layers[0]
    experts = fixture.num_experts * len(model.layers)
    assert expert_ram(plan) == experts * (layer.packed + layer.bias)
    stored = 4 * (2 * fixture.intermediate + fixture.hidden)
    assert stored <= layer.bias <= stored + 4 * 63  # down's rows are padded to strips
    loaded = next(wrappers(fixture.directory, "MXFP4"))
    assert loaded.nbytes == fixture.num_experts * (layer.packed + layer.bias)


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("deepseek_v4_fused")])
def test_every_byte_of_a_checkpoint_is_in_a_part(name: str, tmp_path: Path) -> None:
    fixture = write_family(name, tmp_path)
    model, summary = read_model(fixture.directory), inspect_checkpoint(fixture.directory)
    draft = model.parts.get("draft layers", 0)
    assert sum(model.parts.values()) == summary.ram_rest + draft
    packed = sum(layer.num_experts * (layer.packed + layer.bias) for layer in model.layers)
    assert packed == pytest.approx(summary.ram_experts[fixture.method], rel=0.02)
    stored = sum(layer.num_experts * layer.on_gpu for layer in model.layers)
    assert stored == summary.parts["routed experts"]
    plan = make_plan(model, request(context=64))
    assert plan.nbytes("RAM") > packed and not plan.shortages


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss_mxfp4", "deepseek_v4_mxfp4"])
def test_the_rest_is_as_large_as_the_loaded_model(name: str, tmp_path: Path) -> None:
    fixture = write_family(name, tmp_path)
    model = from_pretrained(fixture.directory, None, threads=1, progress=False, dense="torch")
    unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    # DeepSeek-V4 keeps some tensors in float32, which its release stores so, and this one as BF16
    actual = sum(t.numel() * (2 if t.is_floating_point() else t.itemsize) for t in unique.values())
    planned = read_model(fixture.directory, dense="torch")
    assert planned.torch_bytes == pytest.approx(actual, rel=TOLERANCE)
    assert planned.dense.nbytes == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss_mxfp4", "mixtral"])
def test_linear_layers_are_as_large_as_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    """Which are packed is told from the modules there, from headers here."""
    fixture = write_family(name, tmp_path)
    model = from_pretrained(fixture.directory, None, threads=1, progress=False, dense="mxfp4")
    planned = read_model(fixture.directory, dense="mxfp4")
    built = [m for m in model.modules() if isinstance(m, HybridLinear | HybridMLP)]
    assert sum(map(nbytes_of, built)) == sum(planned.dense.arenas) > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "deepseek_v4"])
@pytest.mark.parametrize("tokens", [8, 64])
def test_transformers_keeps_a_cache_of_that_size(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    config = FAMILIES[name].config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for token in range(tokens):  # one at a time, as in decode
            model(input_ids=torch.tensor([[token % 7]]), past_key_values=cache, use_cache=True)
    predicted = transformers_cache(_as_saved(config), tokens)
    actual = _cache_bytes(cache)
    # a window holds one token less than is seen; compressions are counted as nearly complete
    slack = sum(r.layers * r.nbytes for r in predicted.rows if "slid" in r.what)
    slack += sum(r.per_gpu(1) for r in predicted.rows if "state" in r.what)
    assert actual <= predicted.per_gpu() <= actual + slack


HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"full_attention_interval": 3, "moe_intermediate_size": 64,
                   "shared_expert_intermediate_size": 64, "num_experts": 4,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                   "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1, "intermediate_size": 64,
              "num_experts": 4, "use_mamba_kernels": False, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 2, "intermediate_size": 64,
                 "moe_intermediate_size": 64, "num_experts": 4, "num_dense_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2,
                         "intermediate_size": 64, "shared_intermediate_size": 64,
                         "num_local_experts": 4, "mamba_n_heads": 8, "mamba_d_state": 16},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4},
    "glm4_moe": {"moe_intermediate_size": 64, "n_routed_experts": 4, "intermediate_size": 64,
                 "n_group": 1, "topk_group": 1, "head_dim": 24},
}  # fmt: skip
"""Six layers, as published: intervals, old names of types, and no `head_dim` but in the last."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_only_layers_with_keys_have_a_kv_cache(family: str) -> None:
    """What Transformers' cache holds for keys and values after a prompt, to the byte."""
    raw = {
        "model_type": family, "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2, "pad_token_id": 0,
        **HYBRIDS[family],
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family].from_dict(dict(raw))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(9)[None], use_cache=True).past_key_values
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    actual = sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    full = ModelConfig(raw).full
    assert actual > 0
    assert transformers_cache(full, 9).per_gpu() == actual
    (row,) = sglang_cache(full, 1024, 512, 1).rows
    assert row.per_gpu(1) * 9 == actual * 1024


def _as_saved(config: AutoConfig) -> dict[str, object]:
    saved: dict[str, object] = json.loads(config.to_json_string(use_diff=False))
    return saved


def _cache_bytes(cache: DynamicCache) -> int:
    """Bytes of every tensor that the layers of a cache hold, each once."""
    found: dict[int, torch.Tensor] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("tokens", [1, 100, 2048])
def test_buffers_are_as_large_as_a_job(tokens: int) -> None:
    model = read_model(TINY)
    wrapper = next(wrappers(TINY, "MXFP4"))
    shape = wrapper._layer.job_shape(tokens, model.top_k)
    assert job_nbytes(model, tokens, 1, 1) == shape.nbytes


@pytest.mark.parametrize("times", [1, 16])
def test_a_long_prompt_takes_the_buffers_that_are_planned(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a pass maps, whatever its length."""
    mapped: list[int] = []
    init = Arena.__init__

    def counted(self: Arena, nbytes: int, numa_nodes: Sequence[int] = ()) -> None:
        mapped.append(nbytes)
        init(self, nbytes, numa_nodes)

    model = read_model(TINY)
    wrapper = next(wrappers(TINY, "MXFP4"))
    layer, tokens = wrapper._layer, times * MAX_TOKENS_PER_JOB
    IDLE.clear()
    monkeypatch.setattr(Arena, "__init__", counted)
    x = np.zeros((tokens, model.hidden), np.uint16)
    ids = np.tile(np.arange(model.top_k), (tokens, 1))
    layer.forward(x, ids, np.ones(ids.shape, np.float32))
    assert sum(mapped) == cpu_buffers(model, tokens, 1, 1)
    assert sum(mapped) == cpu_buffers(model, MAX_TOKENS_PER_JOB, 1, 1)
