"""Tokens per second from ceilings: what a token reads and computes, over how fast that goes.

Decode reads every active weight once for a token; prefill reads every expert once for a chunk and
multiplies. Experts on CPU and GPU work at the same time, so the slower of the two counts. The
shares of the ceilings that are reached are measured on the CPU (docs/results) and assumed on GPUs.
Attention over the context is counted as reading a half full KV cache; its arithmetic is not.
Without a profile of the routing, all experts are taken to be equally likely.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hybrid_moe.planning.kv_cache import KvCache
from hybrid_moe.planning.machine import CpuSpeeds, Gpu
from hybrid_moe.planning.model import HotExperts, Model

READ_SHARE = 0.7
"""Of the read bandwidth, at one token: 0.73 to 1.09 in docs/results. The lowest are experts of
2.5 MB; above 1 the bandwidth was higher during a measurement than before and after it."""

MAC_SHARE = 0.5
"""Of the peak multiply-accumulates, at 1024 tokens: 0.54 to 0.94 in docs/results."""

GPU_READ_SHARE, GPU_FLOP_SHARE = 0.75, 0.4
"""Assumed, of a GPU's data sheet."""

DENSE_READ_SHARE = 0.93
"""Of the read bandwidth, in linear layers at one token."""

TORCH_SHARE = 0.5
"""Assumed, of the CPU's ceilings in what torch computes beside the experts."""

HANDOVER_S = 100e-6
"""For each layer with experts on the CPU: the wake-up of workers that sleep while attention runs,
and the wrapper. Measured with CPU tensors; assumed to be no more with a GPU's copies and flags."""

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6))


@dataclass(frozen=True)
class Term:
    """A part of the time: what it is, seconds, and the amount over the speed in words."""

    name: str
    seconds: float
    why: str


@dataclass(frozen=True)
class Prediction:
    """A predicted speed.

    Attributes:
        tokens_per_second: of one request.
        terms: where the time goes; terms that overlap are all listed.
        limit: the longest term in words.
        help: what would make it faster.
    """

    tokens_per_second: float
    terms: tuple[Term, ...]
    limit: str
    help: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


_HELP = {
    "RAM bandwidth": "more experts on the GPU, faster memory or more memory channels",
    "CPU arithmetic": "more cores, or a processor with AVX-512 or AMX; more experts on the GPU",
    "GPU bandwidth": "a GPU with faster memory, or more GPUs",
    "GPU arithmetic": "a faster GPU, or more GPUs",
    "RAM bandwidth, dense": "linear layers in fewer bits (--dense int8, --dense mxfp4), or a GPU",
    "RAM bandwidth, rest": "a GPU, which takes everything but the routed experts",
    "CPU arithmetic, dense": "more cores, or a GPU, which takes everything but the routed experts",
    "CPU arithmetic, rest": "a GPU, which takes everything but the routed experts",
    "hand-over": "all experts of a layer on the GPU: this is the price of each layer on the CPU",
}
"""By the name of the term that limits."""


def predict_decode(
    model: Model, hot: HotExperts, cpu: CpuSpeeds, gpus: tuple[Gpu, ...], cache: KvCache
) -> Prediction:
    """Speed of one token at a time, the context half full."""
    cold = sum(layer.top_k * hot.cold_share(layer) * layer.packed for layer in model.layers)
    terms = [_read("RAM bandwidth", "experts", cold, cpu.read * READ_SHARE)]
    if not gpus:
        rest = model.torch_read + cache.per_gpu() / 2
        dense = cpu.read * DENSE_READ_SHARE
        terms.append(_read("RAM bandwidth, dense", "linear layers", model.dense.nbytes, dense))
        terms.append(_read("RAM bandwidth, rest", "the rest", rest, cpu.read * TORCH_SHARE))
        terms.append(_handover(model, hot))
        return _prediction(terms, sum(term.seconds for term in terms), 1)
    speed = min(gpu.bandwidth for gpu in gpus) * GPU_READ_SHARE
    read_hot = sum(
        layer.top_k * (1 - hot.cold_share(layer)) * layer.on_gpu for layer in model.layers
    )
    rest = model.read_per_token / len(gpus) + cache.per_gpu(len(gpus)) / 2
    terms.append(_read("GPU bandwidth", "weights and cache", rest + read_hot / len(gpus), speed))
    terms.append(_handover(model, hot))
    seconds = rest / speed + terms[-1].seconds
    return _prediction(terms, seconds + max(terms[0].seconds, read_hot / len(gpus) / speed), 1)


def predict_prefill(
    model: Model, hot: HotExperts, cpu: CpuSpeeds, gpus: tuple[Gpu, ...], tokens: int
) -> Prediction:
    """Speed of a chunk of `tokens`."""
    macs = {
        layer: tokens * layer.top_k * hot.cold_share(layer) * layer.weights
        for layer in model.layers
    }
    touched = sum(
        hot.cold(layer) * layer.packed * _met(tokens * layer.top_k, layer.num_experts)
        for layer in model.layers
    )
    # of several formats the mean speed, each as long as its layers take
    seconds = sum(n / cpu.macs[layer.method.name] for layer, n in macs.items())
    count = sum(macs.values())
    rate = count / seconds if seconds else cpu.macs[model.formats[0].name]
    compute = _compute("CPU arithmetic", "experts", count, rate * MAC_SHARE, "MAC")
    read = _read("RAM bandwidth", "experts", touched, cpu.read * READ_SHARE)
    cold = max(compute.seconds, read.seconds)
    if not gpus:
        fmt = model.dense.fmt
        dense = _compute(
            "CPU arithmetic, dense", "linear layers", tokens * model.dense.weights,
            cpu.macs["BF16" if fmt is None else fmt.name] * MAC_SHARE, "MAC",
        )  # fmt: skip
        rest = _compute(
            "CPU arithmetic, rest", "the rest", tokens * model.torch_weights,
            cpu.macs["BF16"] * TORCH_SHARE, "MAC",
        )  # fmt: skip
        seconds = cold + dense.seconds + rest.seconds
        return _prediction([compute, read, dense, rest], seconds, tokens)
    speed = sum(gpu.flops for gpu in gpus) * GPU_FLOP_SHARE
    hot_flops = 2 * sum(
        tokens * layer.top_k * (1 - hot.cold_share(layer)) * layer.weights for layer in model.layers
    )
    rest_flops = 2.0 * tokens * model.weights_per_token
    gpu = _compute("GPU arithmetic", "experts and the rest", rest_flops + hot_flops, speed, "FLOP")
    handover = _handover(model, hot)
    seconds = rest_flops / speed + max(cold, hot_flops / speed) + handover.seconds
    return _prediction([compute, read, gpu, handover], seconds, tokens)


def _met(draws: int, experts: int) -> float:
    """Share of the experts that at least one of so many random draws meets."""
    return 1 - (1 - 1 / experts) ** draws


def _read(name: str, what: str, nbytes: float, speed: float) -> Term:
    return Term(name, nbytes / speed, f"{_si(nbytes, 'B')} of {what} at {_si(speed, 'B/s')}")


def _compute(name: str, what: str, count: float, speed: float, unit: str) -> Term:
    why = f"{_si(count, unit)} of {what} at {_si(speed, f'{unit}/s')}"
    return Term(name, count / speed, why)


def _si(value: float, unit: str) -> str:
    """1.9e9, "B" -> "1.9 GB"; from 100 on without a fraction."""
    prefix, size = next((row for row in _PREFIXES if value >= row[1]), _PREFIXES[-1])
    return f"{value / size:.{0 if value >= 100 * size else 1}f} {prefix}{unit}"


def _handover(model: Model, hot: HotExperts) -> Term:
    layers = sum(hot.cold(layer) > 0 for layer in model.layers)
    why = f"{layers} layers x {HANDOVER_S * 1e6:g} us"
    return Term("hand-over", layers * HANDOVER_S, why)


def _prediction(terms: list[Term], seconds: float, tokens: int) -> Prediction:
    longest = max(terms, key=lambda term: term.seconds)
    limit = f"{longest.name}: {longest.why}"
    kept = tuple(term for term in terms if term.seconds > 0)
    return Prediction(tokens / seconds, kept, limit, _HELP[longest.name])
