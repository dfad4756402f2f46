"""Tokens per second beside a GPU, from the timeline of a step (`schedule.timeline`).

Decode reads every active weight once for a token; prefill reads every expert once for a chunk and
multiplies. The shares of the ceilings that are reached are measured on the CPU (docs/results) and
assumed on GPUs. Attention over the context is counted as reading a half full KV cache; its
arithmetic is not. Without a profile of the routing, all experts are taken to be equally likely.
`cpu_only` predicts machines without a GPU.
"""

from __future__ import annotations

from hybrid_moe.planning.kv_cache import KvCache
from hybrid_moe.planning.machine import CpuSpeeds, Gpu
from hybrid_moe.planning.model import HotExperts, Model
from hybrid_moe.planning.step_work import StepWork, expert_work, gpu_layers, split_of
from hybrid_moe.planning.streaming import LINK, streamed_step
from hybrid_moe.planning.terms import (
    Prediction,
    Term,
    computing,
    each,
    prediction,
    reading,
)
from hybrid_moe.schedule.layer_times import gpu_seconds
from hybrid_moe.schedule.layer_work import ExpertSplit, GpuAmount
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.timeline import run_step

READ_SHARE = 0.7
"""Of the read bandwidth, at one token: 0.73 to 1.09 in docs/results. The lowest are experts of
2.5 MB; above 1 the bandwidth was higher during a measurement than before and after it."""

MAC_SHARE = 0.5
"""Of the peak multiply-accumulates, at 1024 tokens: 0.54 to 0.94 in docs/results."""

GPU_READ_SHARE, GPU_FLOP_SHARE = 0.75, 0.4
"""Assumed, of a GPU's data sheet."""

HANDOVER_S = 100e-6
"""For each layer with experts on the CPU: the wake-up of workers that sleep while attention runs,
and the wrapper. Measured with CPU tensors; assumed to be no more with a GPU's copies and flags, and
half of it on the way there."""


def rates_of(cpu: CpuSpeeds, gpus: tuple[Gpu, ...]) -> MachineRates:
    """What a machine's kernels reach. Several GPUs read at the same time, each its part: the rate
    of reading is that of the slowest one, the amounts are those of one."""
    return MachineRates(
        cpu_read=cpu.read * READ_SHARE,
        gpu_read=min(gpu.bandwidth for gpu in gpus) * GPU_READ_SHARE,
        gpu_flops=sum(gpu.flops for gpu in gpus) * GPU_FLOP_SHARE,
        submit=HANDOVER_S / 2,
        back=HANDOVER_S / 2,
    )


def step_of(
    model: Model,
    hot: HotExperts,
    cpu: CpuSpeeds,
    gpus: tuple[Gpu, ...],
    tokens: int = 1,
    cache: float = 0.0,
) -> StepWork:
    """A batch of `tokens`, `cache` bytes of which are read on each GPU."""
    experts = [expert_work(layer, cpu, MAC_SHARE, len(gpus)) for layer in model.layers]
    works = gpu_layers(model, experts, tokens, cache, len(gpus))
    splits = {layer.layer: split_of(layer, hot, tokens) for layer in model.layers}
    found = tuple(splits.get(work.layer, ExpertSplit()) for work in works)
    return StepWork(works, found, rates_of(cpu, gpus))


def predict_decode(
    model: Model, hot: HotExperts, cpu: CpuSpeeds, gpus: tuple[Gpu, ...], cache: KvCache
) -> Prediction:
    """Speed of one token at a time, the context half full."""
    held = cache.per_gpu(len(gpus)) / 2
    step = step_of(model, hot, cpu, gpus, cache=held)
    line = run_step(step.times(), after=output_seconds(model, len(gpus), step.rates))
    read = model.read_per_token / len(gpus) + held + _hot_nbytes(step)
    terms = [
        streamed("RAM bandwidth", step),
        reading("GPU bandwidth", "weights and cache", read, step.rates.gpu_read),
        _handover(step),
    ]
    return prediction(terms, line.seconds, 1)


def output_seconds(model: Model, num_gpus: int, rates: MachineRates) -> float:
    """Of the output layer, behind the last one."""
    return gpu_seconds(GpuAmount(model.output_layer / num_gpus), rates)


def streamed(name: str, step: StepWork) -> Term:
    """The CPU's experts of a token: read, or decoded where that takes longer."""
    seconds = step.cold_seconds
    return reading(
        name,
        "experts",
        step.cold_nbytes,
        step.cold_nbytes / seconds if seconds else step.rates.cpu_read,
    )


def predict_prefill(
    model: Model,
    hot: HotExperts,
    cpu: CpuSpeeds,
    gpus: tuple[Gpu, ...],
    tokens: int,
    stream_memory: int = 0,
) -> Prediction:
    """Speed of a chunk of `tokens`; with memory of each GPU for experts that travel meanwhile."""
    step = step_of(model, hot, cpu, gpus, tokens)
    if stream_memory:
        step, line = streamed_step(step, stream_memory)
    else:
        line = run_step(step.times())
    flops = sum(work.before.flops + work.shared.flops for work in step.works)
    flops += 2 * sum(
        (split.hot.pairs + split.sent.pairs) * work.expert.weights
        for work, split in zip(step.works, step.splits, strict=True)
        if work.expert is not None
    )
    terms = [
        *multiplied(step, "CPU arithmetic", "RAM bandwidth"),
        computing("GPU arithmetic", "experts and the rest", flops, step.rates.gpu_flops, "FLOP"),
        reading("link", "experts", step.sent_nbytes, LINK),
        _handover(step),
    ]
    return prediction(terms, line.seconds, tokens)


def multiplied(step: StepWork, arithmetic: str, bandwidth: str) -> tuple[Term, Term]:
    """The CPU's experts of a chunk: their arithmetic, at the mean speed of their formats, and
    reading each that some token takes."""
    seconds = step.multiplying
    rate = step.cold_macs / seconds if seconds else 1.0
    return (
        computing(arithmetic, "experts", step.cold_macs, rate),
        reading(bandwidth, "experts", step.cold_nbytes, step.rates.cpu_read),
    )


def _hot_nbytes(step: StepWork) -> float:
    return sum(
        split.hot.experts * work.expert.gpu_nbytes
        for work, split in zip(step.works, step.splits, strict=True)
        if work.expert is not None
    )


def _handover(step: StepWork) -> Term:
    return each("hand-over", step.cold_layers, "layers", HANDOVER_S)
