"""Laws of a plan, advice that holds, and the numbers on a small example."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.formats.table import BF16, FORMATS
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.loaders import Checkpoint, inspect_checkpoint
from hybrid_moe.placement.profile import read_profile, write_profile
from hybrid_moe.planning import (
    CpuSpeeds,
    DoesNotFitError,
    Model,
    Plan,
    cpu_only,
    make_plan,
    parse_gpus,
    parse_size,
    read_model,
    slots_of,
)
from hybrid_moe.planning.hot_choice import hot_bytes
from hybrid_moe.planning.kernel_shares import one_token_share
from hybrid_moe.planning.kv_cache import kind_of, sglang_cache
from hybrid_moe.planning.machine import measure_cpu, read_receipt
from hybrid_moe.planning.model import LayerExperts
from hybrid_moe.planning.plan import GPU, RAM
from hybrid_moe.planning.prediction import GPU_READ_SHARE, HANDOVER_S, READ_SHARE
from hybrid_moe.planning.serving import server_command
from hybrid_moe.planning.step_work import expert_work
from hybrid_moe.schedule.layer_times import cpu_seconds
from hybrid_moe.schedule.layer_work import ExpertCount
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.text import format_bytes
from tests.families import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, write_family
from tests.hybrid_moe.planning.cases import CPU, GIB, expert_ram, request
from tests.hybrid_moe.planning.conftest import Fake
from tests.hybrid_moe.planning.fake_checkpoints import MODELS, write_headers

# Sizes and machines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 << 30), ("24 GiB", 24 << 30), ("1.5g", 3 << 29), ("512MiB", 1 << 29), ("7", 7)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24XB", "0", "1e3", "24GBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'size "{text}"')):
        parse_size(text)


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [((), ()), (("24GB",), (24,)), (("2x24GB",), (24, 24)), (("24GB", "2X32GB"), (24, 32, 32))],
)
def test_gpus(texts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    assert tuple(gpu.nbytes >> 30 for gpu in parse_gpus(texts)) == sizes


def test_a_gpu_has_the_speed_that_was_given() -> None:
    (gpu,) = parse_gpus(["24GB"], 1008)
    assert gpu.bandwidth == 1008e9 and "as given" in gpu.source
    assert "assumed" in parse_gpus(["24GB"])[0].source
    assert parse_gpus(["500GB"])[0].bandwidth == parse_gpus(["192GB"])[0].bandwidth


def test_speeds_of_a_receipt(tmp_path: Path) -> None:
    file = tmp_path / "ceilings.json"
    document = {
        "processor": "P", "threads": 2,
        "reads": [
            {"where": "1 thread", "at_random": 1.0}, {"where": "all threads", "at_random": 26.5}
        ],
        "peaks": [
            {"op": "byte_dot", "all_threads": 200.0}, {"op": "byte_dot", "all_threads": 240.0},
            {"op": "pair_dot", "all_threads": 70.0}, {"op": "wide_dot", "all_threads": 110.0},
        ],
    }  # fmt: skip
    file.write_text(json.dumps(document))
    speeds = read_receipt(file)
    assert speeds.read == 26.5e9 and set(speeds.macs) == set(FORMATS)
    # two byte products of each
    assert speeds.macs["MXFP4"] == speeds.macs["INT4_ROW_FLOAT32"] == speeds.macs["Q4_K"] == 120e9
    assert speeds.macs["BF16"] == speeds.macs["FP8"] == 70e9 and speeds.macs["INT8"] == 110e9
    assert speeds.source == "ceilings.json: P, 2 threads"
    for damage in ("{", "[]", "{}", json.dumps({**document, "reads": []})):
        file.write_text(damage)
        with pytest.raises(ValueError, match="is no receipt of"):
            read_receipt(file)


def test_this_machine_can_be_measured() -> None:
    speeds = measure_cpu(1, seconds=0.02)
    assert speeds.read > 0 and all(rate > 0 for rate in speeds.macs.values())
    assert set(speeds.macs) == set(FORMATS)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_experts_stream_as_fast_as_they_are_read_or_decoded(fmt: WeightFormat) -> None:
    """The slower of both; a prompt multiplies at least as fast as one token decodes."""
    packed = packed_nbytes(fmt, 4096, 2048)
    weights = 3 * 4096 * 2048
    layer = LayerExperts(0, 64, 6, layer_formats(fmt), packed, 0, packed, weights)
    macs = dict.fromkeys(FORMATS, 100e9)
    assert 0.3 * 100e9 < layer.token_rate(macs) <= layer.rate(macs) <= 100e9
    decoding = weights / layer.token_rate(macs)
    expert = expert_work(layer, CpuSpeeds(1.0, macs, ""), 0.5)
    one, two = ExpertCount(1, 1), ExpertCount(1, 2)
    assert cpu_seconds(expert, one, MachineRates(1e15, 1, 1)) == pytest.approx(decoding)
    assert cpu_seconds(expert, one, MachineRates(1e6, 1, 1)) == packed / 1e6 > decoding
    more = weights / (layer.rate(macs) * 0.5)
    assert cpu_seconds(expert, two, MachineRates(1e15, 1, 1)) == pytest.approx(decoding + more)


def test_layers_of_two_formats_take_the_time_of_both() -> None:
    formats = LayerFormats(FORMATS["Q4_K"], FORMATS["Q6_K"])
    layer = LayerExperts(0, 64, 6, formats, 1, 0, 1, 3)
    q4, q6 = (100 * one_token_share(fmt) for fmt in formats)
    rate = layer.token_rate({"Q4_K": 100.0, "Q6_K": 100.0})
    assert rate == pytest.approx(3 / (2 / q4 + 1 / q6)) and q6 < rate < q4


# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-oss-120b", 116.8),
        ("gpt-oss-20b", 20.9),
        ("Qwen3-30B-A3B", 30.5),
        ("Qwen3-235B-A22B", 235.1),
        ("DeepSeek-V4-Flash", 284.0),
    ],
)
def test_published_sizes(fake: Fake, name: str, billions: float) -> None:
    """The fake checkpoints have as many parameters as the models' cards say."""
    checkpoint = Checkpoint.open(fake(name))
    count = 0
    for key, tensor in checkpoint.index.tensors.items():
        if not key.startswith("mtp.") and not key.endswith(("scale", "_scales", "tid2eid")):
            packed = key in checkpoint.expert_keys and tensor.dtype in ("U8", "I8")
            count += math.prod(tensor.shape) * (2 if packed else 1)
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_model_needs_a_configuration_and_experts(tmp_path: Path) -> None:
    directory = write_headers(tmp_path, MODELS["gpt-oss-20b"], {"num_hidden_layers": 2})
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "unheard_of"  # a family that Transformers knows has defaults
    del config["num_experts_per_tok"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks num_experts_per_tok"):
        read_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_model(directory)


def test_the_base_must_be_of_the_same_model(fake: Fake) -> None:
    with pytest.raises(CheckpointError, match="num_experts=128, not 32"):
        read_model(fake("gpt-oss-20b"), fake("gpt-oss-120b"))
    with pytest.raises(ValueError, match="does not become BF16"):
        read_model(fake("gpt-oss-20b"), method="BF16")


def test_converted_experts_go_to_the_gpu_from_the_base(fake: Fake) -> None:
    converted, original = fake("Qwen3-30B-A3B-MXFP4"), fake("Qwen3-30B-A3B")
    alone = read_model(converted)
    plan = make_plan(alone, request("32GB"))
    assert not alone.hot_possible and plan.hot.most == 0
    assert any("--base" in note for note in plan.notes)
    both = read_model(converted, original)
    assert both.layers[0].on_gpu == 6 * both.hidden * both.intermediate  # three BF16 matrices
    assert both.layers[0].packed == alone.layers[0].packed < both.layers[0].on_gpu / 3
    assert make_plan(both, request("32GB")).hot.most > 0


def test_each_layer_in_its_own_format(tmp_path: Path) -> None:
    model = read_model(write_family("qwen3_moe_mixed", tmp_path).directory)
    assert [layer.formats.name for layer in model.layers] == ["MXFP4", "BF16"]
    bits = {"MXFP4": 4.25, "BF16": 16}
    weights = EXPERTS * 3 * HIDDEN * INTERMEDIATE
    plan = make_plan(model, request(huge_pages=False, context=64))
    parts = {part.name: part.nbytes for part in plan.parts}
    for name, layer in zip(bits, model.layers, strict=True):
        # panels are padded to cache lines, by less than 2%
        assert parts[f"routed experts, CPU, {name}"] == EXPERTS * layer.packed
        assert EXPERTS * layer.packed == pytest.approx(weights * bits[name] / 8, rel=0.02)
    assert expert_ram(plan) == sum(EXPERTS * layer.packed for layer in model.layers)
    read = TOP_K * sum(layer.packed for layer in model.layers)
    term = next(t for t in plan.decode.terms if t.name == "experts")
    assert term.seconds == pytest.approx(read / (CPU.read * cpu_only.STREAM_SHARE))
    # half of the arithmetic at each format's rate
    slow = replace(CPU, macs={"MXFP4": 1000e9, "BF16": 250e9})
    prefill = make_plan(model, request(cpu=slow, chunk=32)).prefill
    macs = 32 * TOP_K * 3 * HIDDEN * INTERMEDIATE
    term = next(t for t in prefill.terms if t.name == "experts, arithmetic")
    # the first token of an expert pays for decoding its weights
    first = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** 32) * 3 * HIDDEN * INTERMEDIATE
    decoding = first / (1000e9 * one_token_share(MXFP4)) + first / (250e9 * one_token_share(BF16))
    rest = (macs - first) / 1000e9 + (macs - first) / 250e9
    assert term.seconds == pytest.approx(decoding + rest / cpu_only.MAC_SHARE)
    # what a server is told, and that it reads no experts for a GPU
    command = server_command(make_plan(model, request("8GB", context=64)))
    given = dict(itertools.pairwise(command.arguments))
    assert (given["--kt-method"], given["--kt-num-gpu-experts"]) == ("STORED", "0")
    # a named method converts what it can
    converted = read_model(model.path, method="MXFP4")
    assert {layer.formats for layer in converted.layers} == {(MXFP4, MXFP4)}
    with pytest.raises(ValueError, match=r"layer 0 of .* MXFP4, which does not become BF16"):
        read_model(model.path, method="BF16")


@pytest.mark.parametrize("name", ["num_experts_per_token", "moe_k", "moe_topk"])
def test_experts_of_a_token_by_layer(tmp_path: Path, name: str) -> None:
    """Layers with 1 and 3 experts for a token read as many as two layers with 2."""
    directory = write_family("qwen3_moe", tmp_path).directory
    config = json.loads((directory / "config.json").read_text())
    del config["num_experts_per_tok"]

    def planned(value: object) -> tuple[Model, Plan]:
        (directory / "config.json").write_text(json.dumps({**config, name: value}))
        model = read_model(directory)
        return model, make_plan(model, request(context=64))

    equal, uniform = planned([2, 2])
    assert equal.layers == planned(2)[0].layers
    model, plan = planned([1, 3])
    assert ([layer.top_k for layer in model.layers], model.top_k) == ([1, 3], 3)
    assert plan.decode.tokens_per_second == pytest.approx(uniform.decode.tokens_per_second)
    assert inspect_checkpoint(directory).experts_per_token == (1, 3)
    with pytest.raises(ValueError, match="lacks num_experts_per_tok of layer 1"):
        planned([2])


def test_a_draft_layer_is_not_part_of_the_model(tmp_path: Path) -> None:
    with_draft = write_family("deepseek_v3_draft", tmp_path / "with").directory
    without = write_family("deepseek_v3", tmp_path / "without").directory
    plans = [make_plan(read_model(d), request(context=64)) for d in (with_draft, without)]
    assert plans[0].nbytes(RAM) == plans[1].nbytes(RAM)
    assert (plans[0].decode, plans[0].prefill) == (plans[1].decode, plans[1].prefill)
    tensors = Checkpoint.open(with_draft).index.tensors
    draft = sum(t.nbytes for key, t in tensors.items() if key.startswith("model.layers.2."))
    assert plans[0].nbytes("not loaded") == draft > 0


def test_slots_without_a_gpu_are_memory_too(gpt_oss: Model) -> None:
    """Every expert once, wherever it is, and a spare place in each layer that has both."""
    plain = make_plan(gpt_oss, request())
    expert = gpt_oss.layers[0].packed + gpt_oss.layers[0].bias
    for share, spare in (("25%", 24), ("100%", 0), ("0.0", 0)):
        slots = slots_of(gpt_oss, share)
        plan = make_plan(gpt_oss, request(slots=slots, huge_pages=False))
        named = {part.name: part.nbytes for part in plan.parts}
        assert named.get("routed experts, slots", 0) == sum(slots.values()) * expert
        assert named.get("routed experts, CPU, spare places", 0) == spare * expert
        all_cold = make_plan(gpt_oss, request(huge_pages=False))
        assert plan.nbytes(RAM) == all_cold.nbytes(RAM) + spare * expert
        assert any("torch computes experts in slots" in note for note in plan.notes)
    assert slots_of(gpt_oss, "25%") == dict.fromkeys(range(24), 8)
    assert not any("slots" in note for note in plain.notes)


# The KV cache -----------------------------------------------------------------------------------

GQA = {
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_size": 128,
}  # fmt: skip
MLA = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "kind", "nbytes"),
    [
        (GQA, "gqa", 4 * 1024 * 2 * 2 * 16 * 2),
        ({**GQA, "head_dim": None}, "gqa", 4 * 1024 * 2 * 2 * 16 * 2),
        ({**GQA, "num_key_value_heads": None}, "gqa", 4 * 1024 * 2 * 8 * 16 * 2),
        ({**GQA, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, "gqa",
         1 * 1024 * 2 * 2 * 16 * 2),
        ({**GQA, "sliding_window": 128}, "gqa", 4 * 1024 * 2 * 2 * 16 * 2),
        ({**GQA, "layer_types": ["mamba", "conv", "moe", "attention", "full_attention"]}, "gqa",
         1 * 1024 * 2 * 2 * 16 * 2),
        ({**GQA, "layer_types": ["sliding_attention"] * 4}, "gqa", 4 * 1024 * 2 * 2 * 16 * 2),
        ({**MLA, "qk_rope_head_dim": 0}, "mla", 61 * 1024 * 512 * 2),
        ({**MLA, "layer_types": ["linear_attention"] * 60 + ["full_attention"]}, "mla",
         1024 * 576 * 2),
        (MLA, "mla", 61 * 1024 * 576 * 2),
        ({**MLA, "index_head_dim": 128}, "mla", 61 * 1024 * (576 * 2 + 132)),
        ({**GQA, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
         "sliding", 2 * 1024 * 128 + 2 * (1 * (32 + 512) + 2 * 64 + 256 + 96) * 128),
    ],
)  # fmt: skip
def test_cache_sizes(config: dict[str, object], kind: str, nbytes: int) -> None:
    assert kind_of(config) == kind
    cache = sglang_cache(config, context=1000, chunk=64, requests=1)
    assert cache.tokens == 1024 and cache.per_gpu() == nbytes


def test_a_cache_that_cannot_be_sized() -> None:
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        sglang_cache({}, 1, 1, 1)
    with pytest.raises(ValueError, match="lacks compress_ratios"):
        sglang_cache(
            {**GQA, "compress_rates": {}, "sliding_window": 8, "index_head_dim": 8}, 1, 1, 1
        )


def test_gpus_share_heads_but_not_latents(fake: Fake, gpt_oss: Model) -> None:
    one, two = (make_plan(gpt_oss, request(gpus)) for gpus in ("24GB", "2x24GB"))
    cache = [next(p.nbytes for p in plan.parts if p.name == "KV cache") for plan in (one, two)]
    assert cache[0] == 2 * cache[1]
    latent = sglang_cache({**MLA, "num_attention_heads": 1}, 4096, 64, 1)
    assert latent.per_gpu(1) == latent.per_gpu(2)
    two_heads = sglang_cache(GQA, 4096, 64, 1)
    assert two_heads.per_gpu(1) == 2 * two_heads.per_gpu(2) == 2 * two_heads.per_gpu(4)


# Laws -------------------------------------------------------------------------------------------

memory = st.integers(8, 96).map(lambda gib: f"{gib}GB")


@given(gpu=memory, context=st.integers(1, 131072), requests=st.integers(1, 64), n=st.integers(1, 2))
def test_what_fits_fits_and_no_expert_more(
    gpt_oss: Model, gpu: str, context: int, requests: int, n: int
) -> None:
    asked = request(f"{n}x{gpu}", context=context, requests=requests)
    plan = make_plan(gpt_oss, asked)
    hot, experts = plan.hot.most, gpt_oss.num_experts
    if plan.shortages:
        assert hot == 0 and plan.nbytes(GPU) > asked.room
        return
    assert plan.nbytes(GPU) <= asked.room
    if hot < experts:
        more = make_plan(gpt_oss, replace(asked, num_gpu_experts=hot + 1))
        assert more.nbytes(GPU) > asked.room and more.shortages
    packed = sum(p.nbytes for p in plan.parts if p.name == "routed experts, CPU, MXFP4")
    each = gpt_oss.layers[0].packed * len(gpt_oss.layers)
    assert packed == (experts - hot) * each
    assert hot_bytes(gpt_oss, plan.hot) == hot * sum(la.on_gpu for la in gpt_oss.layers)


@given(small=st.integers(14, 60), more=st.integers(0, 40))
def test_more_gpu_memory_never_hurts(gpt_oss: Model, small: int, more: int) -> None:
    less, large = (make_plan(gpt_oss, request(f"{gib}GB")) for gib in (small, small + more))
    assert large.hot.most >= less.hot.most
    assert large.nbytes(RAM) <= less.nbytes(RAM)


@given(read=st.floats(1e9, 1e12), faster=st.floats(1.0, 4.0))
def test_a_faster_machine_is_predicted_to_be_faster(
    gpt_oss: Model, read: float, faster: float
) -> None:
    for gpus in ((), ("16GB",)):
        slow = make_plan(gpt_oss, request(*gpus, cpu=replace(CPU, read=read)))
        fast = make_plan(gpt_oss, request(*gpus, cpu=replace(CPU, read=read * faster)))
        assert fast.decode.tokens_per_second >= slow.decode.tokens_per_second
        assert fast.prefill.tokens_per_second >= slow.prefill.tokens_per_second


# What does not fit ------------------------------------------------------------------------------


def shortage(plan: Plan) -> str:
    with pytest.raises(DoesNotFitError) as caught:
        plan.check()
    return str(caught.value)


def test_a_context_too_long_for_the_gpu(fake: Fake) -> None:
    model = read_model(fake("Qwen3-30B-A3B"))
    plan = make_plan(model, request("10GB", context=40960))
    message = shortage(plan)
    over = format_bytes(plan.nbytes(GPU) - (10 << 30))
    assert f"GPU memory (10.00 GiB each) is too small by {over}" in message
    found = re.search(r"--context (\d+) fits", message)
    assert found is not None
    largest = int(found[1])
    assert not make_plan(model, request("10GB", context=largest)).shortages
    assert make_plan(model, request("10GB", context=largest + 1024)).shortages
    assert "--gpu 2x10GB" in message
    assert not make_plan(model, request("2x10GB", context=40960)).shortages


def test_too_many_experts_for_the_gpu(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("16GB", num_gpu_experts=32))
    found = re.search(r"fewer experts on the GPU \((\d+) per layer fit\)", shortage(plan))
    assert found is not None
    assert not make_plan(gpt_oss, request("16GB", num_gpu_experts=int(found[1]))).shortages
    assert make_plan(gpt_oss, request("16GB", num_gpu_experts=int(found[1]) + 1)).shortages


def test_large_chunks(gpt_oss: Model) -> None:
    message = shortage(make_plan(gpt_oss, request("16GB", chunk=8192)))
    assert "--chunk 2048 fits" in message


def test_a_gpu_that_is_too_small_for_anything(gpt_oss: Model) -> None:
    message = shortage(make_plan(gpt_oss, request("2GB", context=1024)))
    assert "a GPU of" in message and "without --gpu" in message


def test_memory_that_is_too_small(fake: Fake, gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request(ram=8 * GIB))
    message = shortage(plan)
    assert f"memory is too small by {format_bytes(plan.nbytes(RAM) - 8 * GIB)}" in message
    assert "--gpu" in message and f"{format_bytes(plan.nbytes(RAM))} of memory or more" in message
    model = read_model(fake("Qwen3-30B-A3B"))
    message = shortage(make_plan(model, request(ram=40 * GIB)))
    assert "--method MXFP4" in message and "fits then" in message
    as_mxfp4 = read_model(fake("Qwen3-30B-A3B"), method="MXFP4")
    assert not make_plan(as_mxfp4, request(ram=40 * GIB)).shortages
    message = shortage(make_plan(gpt_oss, request("16GB", ram=7 * GIB)))
    assert "more experts of each layer on GPUs" in message


# Placement by a profile -------------------------------------------------------------------------


def test_a_profile_decides(gpt_oss: Model, tmp_path: Path) -> None:
    file = tmp_path / "hot.json"
    hot = {layer.layer: list(range(layer.layer % 3)) for layer in gpt_oss.layers}
    write_profile(file, hot)
    plan = make_plan(gpt_oss, request("24GB", profile=read_profile(file)))
    assert plan.hot.counts == {layer: len(ids) for layer, ids in hot.items()}
    assert plan.hot.most == 2
    write_profile(file, {layer: ids for layer, ids in hot.items() if layer != 5})
    with pytest.raises(ValueError, match="has no layer 5"):
        make_plan(gpt_oss, request("24GB", profile=read_profile(file)))


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        ((), {"num_gpu_experts": 1}, "need a GPU"),
        (("24GB",), {"context": 0}, "context is 0"),
        (("24GB",), {"requests": 0}, "requests is 0"),
        (("24GB",), {"num_gpu_experts": 33}, "a layer has 0 to 32"),
    ],
)
def test_impossible_requests(
    gpt_oss: Model, gpus: tuple[str, ...], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(gpt_oss, request(*gpus, **changes))


# Predictions ------------------------------------------------------------------------------------


def test_decode_on_a_gpu_is_the_sum_of_its_parts(gpt_oss: Model) -> None:
    """Recomputed from the sizes of gpt-oss-20b: 24 layers, 32 experts, top-4, H = I = 2880."""
    plan = make_plan(gpt_oss, request("14GB", num_gpu_experts=8))
    expert = 3 * 2880 * 2880 * 4.25 / 8 + 4 * 3 * 2880  # biases are float32
    cold = 24 * 4 * (24 / 32) * expert / (80e9 * READ_SHARE)
    # weights that a token reads: all but embeddings and experts
    attention = 2 * (2 * 2880 * 4096 + 2 * 2880 * 512 + 4096 + 2 * 512 + 2880 + 64)
    layer = attention + 2 * 2 * 2880 + 2 * (32 * 2880 + 32)
    rest = 24 * layer + 2 * 201088 * 2880 + 2 * 2880 + plan.cache.per_gpu() / 2
    gpu = 448e9 * GPU_READ_SHARE
    expected = rest / gpu + cold + 24 * HANDOVER_S
    assert 1 / plan.decode.tokens_per_second == pytest.approx(expected, rel=1e-3)
    speed = f"{80 * READ_SHARE:.1f} GB/s"
    assert plan.decode.limit == f"RAM bandwidth: 954 MB of experts at {speed}"


def test_prefill_on_the_cpu_is_arithmetic(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request())
    term = next(t for t in plan.prefill.terms if t.name == "experts, arithmetic")
    first = 24 * 32 / one_token_share(MXFP4)  # of each expert a token, which decodes it
    rest = (2048 * 24 * 4 - 24 * 32) / cpu_only.MAC_SHARE
    assert term.seconds == pytest.approx((first + rest) * 3 * 2880 * 2880 / 1000e9)
    assert plan.prefill.limit.startswith("experts, arithmetic")


def test_all_experts_on_the_gpu_leave_nothing_for_the_cpu(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("48GB"))
    assert plan.hot.most == 32 and expert_ram(plan) == 0
    assert {term.name for term in plan.decode.terms} == {"GPU bandwidth"}
    assert plan.decode.help.startswith("a GPU with faster memory")


def test_a_plan_is_json(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request("16GB"))
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["gpu_bytes"] == plan.nbytes(GPU)
    assert document["decode"]["tokens_per_second"] == plan.decode.tokens_per_second
    assert document["gpu_experts"]["0"] == plan.hot.most
