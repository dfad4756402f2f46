"""Machines without a GPU: linear layers in strips, what a token reads, and how long that takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.planning import Model, cpu_only, make_plan, read_model
from hybrid_moe.planning.kernel_shares import one_token_share
from hybrid_moe.planning.plan import RAM
from hybrid_moe.planning.reading import token_reads
from hybrid_moe.planning.terms import HELP
from tests.families import write_family
from tests.hybrid_moe.planning.cases import CPU, request
from tests.hybrid_moe.planning.conftest import Fake

H, QUERIES, KEYS, VOCABULARY, LAYERS = 2880, 4096, 512, 201088, 24
"""Of gpt-oss-20b."""
PROJECTIONS = H * (2 * QUERIES + 2 * KEYS)
HEAD = VOCABULARY * H
EXPERTS = LAYERS * 4 * (3 * H * H * 17 // 32 + 4 * 3 * H)
ROUTERS = LAYERS * (32 * H + 32) * 2
NORMS, SINKS = (2 * LAYERS + 1) * H * 2, LAYERS * 64 * 2


def test_what_a_token_reads(gpt_oss: Model) -> None:
    """Recomputed: experts' rows are whole strips, and so are those of all matrices."""
    reads = token_reads(gpt_oss, 1000)
    assert reads.experts == EXPERTS
    biases = 4 * (LAYERS * (QUERIES + 2 * KEYS + H) + VOCABULARY)
    assert reads.dense == 2 * (LAYERS * PROJECTIONS + HEAD) + biases
    assert reads.torch == ROUTERS + NORMS + SINKS
    assert reads.cache == LAYERS // 2 * (1000 + 128) * 2 * 2 * KEYS
    assert reads.total == reads.experts + reads.dense + reads.torch + reads.cache
    assert token_reads(gpt_oss, 0).cache == 0


def test_the_format_of_linear_layers(fake: Fake, gpt_oss: Model) -> None:
    torch, small = (read_model(fake("gpt-oss-20b"), dense=name) for name in ("torch", "MXFP4"))
    assert torch.dense.nbytes == 0 and torch.dense.weights == 0
    assert small.dense.weights == gpt_oss.dense.weights == LAYERS * PROJECTIONS
    assert sum(small.dense.arenas) == pytest.approx(sum(gpt_oss.dense.arenas) * 4.25 / 16)
    stored = sum(torch.parts.values())
    assert torch.torch_bytes == stored and torch.torch_weights == torch.weights_per_token
    embeddings = 2 * HEAD
    assert gpt_oss.torch_bytes == small.torch_bytes == embeddings + ROUTERS + NORMS + SINKS
    assert token_reads(torch, 64).total == pytest.approx(token_reads(gpt_oss, 64).total, rel=1e-3)
    with pytest.raises(ValueError, match="unknown method 'q9'"):
        read_model(fake("gpt-oss-20b"), dense="q9")


def test_small_and_odd_layers_stay_with_torch(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path).directory
    before = read_model(folder).dense.keys
    assert before and all("proj" in key or "lm_head" in key for key in before)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    key = next(key for key in before if "o_proj" in key)
    tensors[key] = tensors[key][:63]  # fewer rows than a strip
    save_file(tensors, file, {"format": "pt"})
    assert before - read_model(folder).dense.keys == {key}


def test_an_output_layer_that_is_the_embedding_is_held_once(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path).directory
    untied = read_model(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, file, {"format": "pt"})
    tied = read_model(folder)
    assert "model.embed_tokens.weight" in tied.dense.keys
    assert "model.embed_tokens.weight" not in untied.dense.keys
    assert tied.dense.nbytes == untied.dense.nbytes
    assert tied.torch_bytes == untied.torch_bytes - head.size * 2


def test_decode_is_the_sum_of_its_parts(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request(context=2000))
    reads = token_reads(gpt_oss, 1000)
    stream = 80e9 * cpu_only.STREAM_SHARE
    half = LAYERS // 2 * (2000 + 128) * 2 * 2 * KEYS / 2
    expected = (
        (reads.experts + reads.dense) / stream
        + reads.torch / (80e9 * cpu_only.TORCH_SHARE)
        + half / (80e9 * cpu_only.CACHE_SHARE)
        + LAYERS * cpu_only.LAYER_S
        + cpu_only.TOKEN_S
    )
    assert 1 / plan.decode.tokens_per_second == pytest.approx(expected)
    assert plan.decode.limit.startswith("linear layers: 2.4 GB of linear layers at")
    assert "--dense int8" in plan.decode.help
    assert {term.name for term in (*plan.decode.terms, *plan.prefill.terms)} <= set(HELP)


def test_prefill_is_arithmetic_unless_memory_is_slower(gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request(context=512))
    seconds = {}
    for term in plan.prefill.terms:
        seconds[term.name] = seconds.get(term.name, 0.0) + term.seconds
    rate = 1000e9 * cpu_only.MAC_SHARE
    # 512 tokens take 4 of 32 experts: each is met, and its first token decodes its weights
    first, pairs = LAYERS * 32, 512 * LAYERS * 4
    decoding = first / (1000e9 * one_token_share(MXFP4))
    expected = 3 * H * H * (decoding + (pairs - first) / rate)
    assert seconds["experts, arithmetic"] == pytest.approx(expected)
    assert seconds["linear layers, arithmetic"] == pytest.approx(512 * LAYERS * PROJECTIONS / rate)
    attention = 512 * (256 + 128) * LAYERS // 2 * 2 * QUERIES  # half of them, or the window
    assert cpu_only.attention_macs(gpt_oss.config, 512) == attention
    total = sum(seconds.values()) - seconds["experts"] - seconds["linear layers"]
    assert 512 / plan.prefill.tokens_per_second == pytest.approx(total)
    slow = replace(CPU, read=1e9)
    plan = make_plan(gpt_oss, request(context=512, cpu=slow))
    assert plan.prefill.limit.startswith("experts: 10.2 GB of experts at")


def test_linear_layers_take_memory_in_their_own_format(fake: Fake, gpt_oss: Model) -> None:
    plan = make_plan(gpt_oss, request(context=64))
    parts = {part.name: part.nbytes for part in plan.parts if part.place == RAM}
    assert parts["linear layers, BF16"] == 2 * (LAYERS * PROJECTIONS + HEAD)
    # an arena for the projections of each layer, and one for the output layer
    assert 0 < parts["linear layers, page rounding"] < (LAYERS + 1) * (2 << 20)
    small = make_plan(read_model(fake("gpt-oss-20b"), dense="mxfp4"), request(context=64))
    saved = (16 - 4.25) / 8 * (LAYERS * PROJECTIONS + HEAD)
    assert plan.nbytes(RAM) - small.nbytes(RAM) == pytest.approx(saved, rel=0.02)
    on_gpu = make_plan(gpt_oss, request("48GB", context=64))
    assert not any(part.name.startswith("linear layers") for part in on_gpu.parts)
