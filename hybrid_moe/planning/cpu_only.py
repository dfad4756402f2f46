"""Tokens per second without a GPU, as `generate` runs a model, from the timeline of a step.

A token reads its experts, the linear layers and the KV cache once, and in between each layer has
work that streams nothing. A prompt multiplies; its attention does so over the context. The shares
of the ceilings and the fixed times are fitted to one model on one processor: gpt-oss-20b on a Zen 4
with two cores, by `bench/end_to_end.py`, where memory was read at 30 to 59 GB/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid_moe.planning.kv_cache import KvCache, keys_seen
from hybrid_moe.planning.machine import CpuSpeeds
from hybrid_moe.planning.model import Model
from hybrid_moe.planning.prediction import multiplied, streamed
from hybrid_moe.planning.step_work import StepWork, expert_work, num_layers
from hybrid_moe.planning.terms import Prediction, Term, computing, each, prediction, reading
from hybrid_moe.schedule.layer_times import LayerTimes
from hybrid_moe.schedule.layer_work import ExpertSplit, GpuAmount, LayerWork, uniform_met
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.timeline import run_step

STREAM_SHARE = 0.95
"""Of the read bandwidth, in what the pool streams at one token: experts and linear layers."""

TORCH_SHARE = 0.5
"""Of the read bandwidth, in what torch reads beside them."""

CACHE_SHARE = 0.4
"""Of the read bandwidth, in attention over the KV cache. 8192 tokens, 189 MB."""

LAYER_S = 600e-6
"""Of each layer at one token, beside what it reads: norms, router and rotary embedding, Python, and
the hand-over of its jobs. A token takes 135 ms where memory is read at 31.6 GB/s and 87 at 59.3: 11
to 21 ms more than 3.73 GB at `STREAM_SHARE` of that, for 24 layers and `TOKEN_S`."""

TOKEN_S = 1300e-6
"""Of each token: embedding, the choice of the next one, and Transformers' loop around it."""

MAC_SHARE = 0.78
"""Of the peak multiply-accumulates of the pool, at 512 tokens and more."""

ATTENTION_SHARE = 0.3
"""Of BF16's peak, in a prompt's attention by torch."""

PASSES = 40
"""How often torch reads or writes the tokens of a layer, [tokens, H] of BF16, at `TORCH_SHARE`."""


def predict_decode(model: Model, cpu: CpuSpeeds, cache: KvCache) -> Prediction:
    """Speed of one token at a time, the context half full."""
    step = _step_of(model, cpu, 1)
    stream, torch = cpu.read * STREAM_SHARE, cpu.read * TORCH_SHARE
    rest = [
        reading("linear layers", "linear layers", model.dense.nbytes, stream),
        reading("the rest", "other weights", model.torch_read, torch),
        reading("KV cache", "a half full KV cache", cache.per_gpu() / 2, cpu.read * CACHE_SHARE),
        each("between jobs", num_layers(model), "layers", LAYER_S),
    ]
    after = each("between tokens", 1, "token", TOKEN_S)
    line = run_step(_one_after_another(step, model, rest), after=after.seconds)
    return prediction([streamed("experts", step), *rest, after], line.seconds, 1)


def predict_prefill(model: Model, cpu: CpuSpeeds, tokens: int) -> Prediction:
    """Speed of a prompt of `tokens`."""
    fmt = model.dense.fmt
    dense_rate = cpu.macs["BF16" if fmt is None else fmt.name] * MAC_SHARE
    step = _step_of(model, cpu, tokens)
    dense = [
        computing(
            "linear layers, arithmetic", "linear layers", tokens * model.dense.weights, dense_rate
        ),
        reading("linear layers", "linear layers", model.dense.nbytes, cpu.read * STREAM_SHARE),
    ]
    torch_macs = computing(
        "the rest", "other layers", tokens * model.torch_weights, cpu.macs["BF16"] * TORCH_SHARE
    )
    passes = PASSES * 2 * tokens * model.hidden * num_layers(model)
    rest = [
        computing(
            "attention", "attention", attention_macs(model.config, tokens),
            cpu.macs["BF16"] * ATTENTION_SHARE,
        ),
        torch_macs,
        reading("the rest", "activations", passes, cpu.read * TORCH_SHARE),
        each("between jobs", num_layers(model), "layers", LAYER_S),
    ]  # fmt: skip
    longer = max(dense, key=lambda term: term.seconds)
    line = run_step(_one_after_another(step, model, [longer, *rest]))
    experts = multiplied(step, "experts, arithmetic", "experts")
    return prediction([*experts, *dense, *rest], line.seconds, tokens)


def _step_of(model: Model, cpu: CpuSpeeds, tokens: int) -> StepWork:
    """The experts, all on the CPU. Rates of a GPU are those of nothing: it gets nothing."""
    rates = MachineRates(cpu.read * STREAM_SHARE, gpu_read=1.0, gpu_flops=1.0)
    works = [
        LayerWork(layer.layer, GpuAmount(), expert=expert_work(layer, cpu, MAC_SHARE))
        for layer in model.layers
    ]
    splits = [
        ExpertSplit(cpu=uniform_met(layer.num_experts, layer.num_experts, layer.top_k, tokens))
        for layer in model.layers
    ]
    return StepWork(tuple(works), tuple(splits), rates)


def _one_after_another(step: StepWork, model: Model, rest: list[Term]) -> list[LayerTimes]:
    """Everything but the experts before them, divided evenly among the layers that have some."""
    each_layer = sum(term.seconds for term in rest) / len(model.layers)
    return [replace(times, before=each_layer) for times in step.times()]


def attention_macs(config: Mapping[str, Any], tokens: int) -> int:
    """Multiply-accumulates of queries with keys and of weights with values, for a prompt. A token
    looks at half of the others on average, and at a window as soon as it is full."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    if config.get("kv_lora_rank"):
        keys = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
        both = keys + int(config["v_head_dim"])
    else:
        both = 2 * size
    return tokens * keys_seen(config, -(-tokens // 2)) * heads * both
