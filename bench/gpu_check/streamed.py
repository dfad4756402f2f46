"""Layers whose experts are cold: all computed by the CPU, and some sent to the GPU for the batch.

    python -m bench.gpu_check.streamed [--points FILE]

Some layers with gpt-oss-120b's experts, 32 in each, one after another on the same batch: a chunk
of a prompt, which is streamed, and a step of decode without a graph, which is decided as long as
that pays. The planners are told nothing of the machine: the first batches teach them. The outputs
of both ways must agree within what rounding in two places may do.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from bench.gpu_check.clock import device, on_gpu
from bench.gpu_check.hybrid import EXPERTS, random_weights
from bench.gpu_check.points import Points
from bench.gpu_check.workload import MODELS, Batch, Model, random_batches
from hybrid_moe.runtime.prefill_stream import PrefillStream
from hybrid_moe.schedule.streamed_prefill import new_prefill_stream
from hybrid_moe.wrapper import KTMoEWrapper

LAYERS = 4
CHUNKS = ((2048, 6), (4, 40))
"""Tokens of a batch, and batches."""
REHEARSED = ((300, 2), (4, 2))
"""Without a GPU."""
MEMORY = 1 << 30


def layers(model: Model, backend: str, stream: PrefillStream | None) -> list[KTMoEWrapper]:
    """Without a hot expert."""
    made = []
    for index in range(LAYERS):
        wrapper = KTMoEWrapper(
            index, model.experts, model.top_k, model.hidden, model.intermediate, method="MXFP4",
            swiglu_limit=model.activation.limit, swiglu_alpha=model.activation.alpha,
            gpu_backend=backend, gpu_device=device(), gpu_slots=0, prefill_stream=stream,
        )  # fmt: skip
        torch.manual_seed(index)  # the same weights, streamed and not
        wrapper.load_weights_from_tensors(**random_weights(model, 2))
        made.append(wrapper)
    return made


def chunk(wrappers: list[KTMoEWrapper], batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Seconds of all layers, and their outputs."""
    stream = torch.cuda.current_stream().cuda_stream if on_gpu() else None
    if on_gpu():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = [w.forward(batch.x, batch.ids, batch.weights, stream) for w in wrappers]
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, outputs


def compare(points: Points, model: Model, backend: str, tokens: int, count: int) -> None:
    """So many batches in both ways."""
    batch = random_batches(model, tokens, device())[0]
    stream = new_prefill_stream(MEMORY)
    cold, streamed = layers(model, backend, None), layers(model, backend, stream)
    seconds: dict[str, float] = {}
    for name, wrappers in (("cpu", cold), ("streamed", streamed)):
        times = []
        for _ in range(count):
            took, outputs = chunk(wrappers, batch)
            times.append(took)
        seconds[name] = min(times)
        if name == "cpu":
            expected = outputs
    for one, other in zip(outputs, expected, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        if not error < 0.02:
            raise AssertionError(f"sent and not, outputs differ by {float(error):.3f}")
    points.add(
        "streamed",
        tokens=len(batch.ids),
        layers=LAYERS,
        cpu_ms=1e3 * seconds["cpu"] if on_gpu() else None,
        ms=1e3 * seconds["streamed"] if on_gpu() else None,
        faster=seconds["cpu"] / seconds["streamed"] if on_gpu() else None,
        sent_bytes=stream.sent_bytes / count / LAYERS,
    )
    for wrapper in (*cold, *streamed):
        wrapper.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", help="write JSON lines there")
    points = Points(parser.parse_args().points)
    backend = "cute" if on_gpu() else "torch"
    model = replace(MODELS[0] if on_gpu() else MODELS[0].small(), experts=EXPERTS)
    for tokens, count in CHUNKS if on_gpu() else REHEARSED:
        compare(points, model, backend, tokens, count)
    print("sent experts measured" if on_gpu() else "rehearsed: not measured without a GPU")


if __name__ == "__main__":
    main()
