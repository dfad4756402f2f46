"""Tokens per second beside a GPU: what a token reads and computes, over how fast that goes.

Decode reads every active weight once for a token; prefill reads every expert once for a chunk and
multiplies. Experts on CPU and GPU work at the same time, so the slower of the two counts. The
shares of the ceilings that are reached are measured on the CPU (docs/results) and assumed on GPUs.
Attention over the context is counted as reading a half full KV cache; its arithmetic is not.
Without a profile of the routing, all experts are taken to be equally likely. `cpu_only` predicts
machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from hybrid_moe.planning.kv_cache import KvCache
from hybrid_moe.planning.machine import CpuSpeeds, Gpu
from hybrid_moe.planning.model import HotExperts, LayerExperts, Model
from hybrid_moe.planning.terms import (
    Prediction,
    Term,
    computing,
    each,
    prediction,
    reading,
    share_met,
)

READ_SHARE = 0.7
"""Of the read bandwidth, at one token: 0.73 to 1.09 in docs/results. The lowest are experts of
2.5 MB; above 1 the bandwidth was higher during a measurement than before and after it."""

MAC_SHARE = 0.5
"""Of the peak multiply-accumulates, at 1024 tokens: 0.54 to 0.94 in docs/results."""

GPU_READ_SHARE, GPU_FLOP_SHARE = 0.75, 0.4
"""Assumed, of a GPU's data sheet."""

HANDOVER_S = 100e-6
"""For each layer with experts on the CPU: the wake-up of workers that sleep while attention runs,
and the wrapper. Measured with CPU tensors; assumed to be no more with a GPU's copies and flags."""


def predict_decode(
    model: Model, hot: HotExperts, cpu: CpuSpeeds, gpus: tuple[Gpu, ...], cache: KvCache
) -> Prediction:
    """Speed of one token at a time, the context half full."""
    cold = {layer: layer.top_k * hot.cold_share(layer) for layer in model.layers}
    terms = [streaming("RAM bandwidth", cold, cpu, READ_SHARE)]
    speed = min(gpu.bandwidth for gpu in gpus) * GPU_READ_SHARE
    read_hot = sum(
        layer.top_k * (1 - hot.cold_share(layer)) * layer.on_gpu for layer in model.layers
    )
    rest = model.read_per_token / len(gpus) + cache.per_gpu(len(gpus)) / 2
    terms.append(reading("GPU bandwidth", "weights and cache", rest + read_hot / len(gpus), speed))
    terms.append(_handover(model, hot))
    seconds = rest / speed + terms[-1].seconds
    return prediction(terms, seconds + max(terms[0].seconds, read_hot / len(gpus) / speed), 1)


def streaming(
    name: str, experts: Mapping[LayerExperts, float], cpu: CpuSpeeds, share: float
) -> Term:
    """The time of one token's experts: so many of each layer, read at that share of the bandwidth,
    or decoded where that takes longer."""
    nbytes = sum(count * (layer.packed + layer.bias) for layer, count in experts.items())
    seconds = sum(
        count * layer.token_seconds(cpu.read * share, cpu.macs) for layer, count in experts.items()
    )
    return reading(name, "experts", nbytes, nbytes / seconds if seconds else cpu.read * share)


def predict_prefill(
    model: Model, hot: HotExperts, cpu: CpuSpeeds, gpus: tuple[Gpu, ...], tokens: int
) -> Prediction:
    """Speed of a chunk of `tokens`."""
    macs = {
        layer: tokens * layer.top_k * hot.cold_share(layer) * layer.weights
        for layer in model.layers
    }
    touched = sum(
        hot.cold(layer) * layer.packed * share_met(tokens * layer.top_k, layer.num_experts)
        for layer in model.layers
    )
    # of several formats the mean speed, each as long as its layers take
    seconds = sum(n / layer.rate(cpu.macs) for layer, n in macs.items())
    count = sum(macs.values())
    rate = count / seconds if seconds else cpu.macs[model.formats[0].name]
    compute = computing("CPU arithmetic", "experts", count, rate * MAC_SHARE)
    read = reading("RAM bandwidth", "experts", touched, cpu.read * READ_SHARE)
    cold = max(compute.seconds, read.seconds)
    speed = sum(gpu.flops for gpu in gpus) * GPU_FLOP_SHARE
    hot_flops = 2 * sum(
        tokens * layer.top_k * (1 - hot.cold_share(layer)) * layer.weights for layer in model.layers
    )
    rest_flops = 2.0 * tokens * model.weights_per_token
    gpu = computing("GPU arithmetic", "experts and the rest", rest_flops + hot_flops, speed, "FLOP")
    handover = _handover(model, hot)
    seconds = rest_flops / speed + max(cold, hot_flops / speed) + handover.seconds
    return prediction([compute, read, gpu, handover], seconds, tokens)


def _handover(model: Model, hot: HotExperts) -> Term:
    layers = sum(hot.cold(layer) > 0 for layer in model.layers)
    return each("hand-over", layers, "layers", HANDOVER_S)
