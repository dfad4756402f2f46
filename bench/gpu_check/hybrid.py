"""A layer with experts on both sides, beside its halves; how fast experts move; what launches cost.

    python -m bench.gpu_check.hybrid [--points FILE]

A step is submit and sync of one layer with gpt-oss-120b's experts, a quarter of 32 on the GPU, in a
CUDA graph. Its ceiling is the longer of its halves: the same wrapper without a back end (the CPU's
part and its hand-over) and the four kernels alone. Promotion is `promote` of an expert until the
device has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu_check.clock import device, on_gpu, time_us
from bench.gpu_check.points import Points
from bench.gpu_check.workload import MODELS, Batch, Model, random_batches
from hybrid_moe.wrapper import KTMoEWrapper

EXPERTS = 32
TOKENS = (1, 4, 16, 64)


def random_weights(model: Model, sources: int) -> dict[str, torch.Tensor]:
    """MXFP4 codes and scales for `load_weights_from_tensors`: `sources` experts, repeated."""
    H, I, E = model.hidden, model.intermediate, model.experts
    made = {}
    for name, rows, inputs in (("gate", I, H), ("up", I, H), ("down", H, I)):
        codes = torch.randint(0, 256, (sources, rows, inputs // 2), dtype=torch.uint8)
        scales = torch.randint(119, 122, (sources, rows, inputs // 32), dtype=torch.uint8)
        repeats = -(-E // sources), 1, 1
        made[f"{name}_proj"] = codes.repeat(repeats)[:E]
        made[f"{name}_scale"] = scales.repeat(repeats)[:E]
        made[f"{name}_bias"] = torch.zeros(E, rows)
    return made


def layer(model: Model, mask: torch.Tensor, backend: str | None, sources: int = 2) -> KTMoEWrapper:
    """A loaded wrapper with so many different experts."""
    made = KTMoEWrapper(
        0, model.experts, model.top_k, model.hidden, model.intermediate,
        gpu_experts_mask=mask, method="MXFP4",
        swiglu_limit=model.activation.limit, swiglu_alpha=model.activation.alpha,
        gpu_backend=backend, gpu_device=device() if backend else None,
        gpu_slots=int(mask.sum()) + 1 if backend else None,
    )  # fmt: skip
    made.load_weights_from_tensors(**random_weights(model, sources))
    return made


def step(wrapper: KTMoEWrapper, batch: Batch) -> Callable[[], object]:
    """One step on torch's current stream."""

    def run() -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream if on_gpu() else None
        wrapper.submit_forward(batch.x, batch.ids, batch.weights, stream)
        return wrapper.sync_forward(batch.x, stream)

    return run


def halves(points: Points, model: Model, mask: torch.Tensor, backend: str) -> None:
    """The layer and its halves over tokens."""
    both, cold = layer(model, mask, backend), layer(model, mask, None)
    slots = both._hot.experts if both._hot is not None else None
    assert slots is not None
    for tokens in TOKENS if on_gpu() else TOKENS[:2]:
        batches = random_batches(model, tokens, device())[:4]

        def hot(batch: Batch) -> Callable[[], object]:
            def run() -> torch.Tensor:
                rows = slots.rows(batch.x, batch.ids)
                return slots.combine(rows, batch.ids, batch.weights, None, slots.slot_of)

            return run

        whole = time_us([step(both, batch) for batch in batches])
        cpu = time_us([step(cold, batch) for batch in batches])
        gpu = time_us([hot(batch) for batch in batches])
        ratio = None if whole is None or cpu is None or gpu is None else whole / max(cpu, gpu)
        points.add(
            "hybrid", tokens=tokens, us=whole, cpu_us=cpu, gpu_us=gpu, ratio=ratio, backend=backend
        )
    for wrapper in (both, cold):
        wrapper.close()


def moves(points: Points, model: Model, mask: torch.Tensor, backend: str) -> None:
    """Promotions of one expert after another, and plain copies of as many bytes."""
    wrapper = layer(model, mask, backend)
    slots = wrapper._hot.experts if wrapper._hot is not None else None
    assert slots is not None
    nbytes, cold = slots.layout.nbytes, (~mask).nonzero().flatten().tolist()
    stream = torch.cuda.current_stream().cuda_stream if on_gpu() else None
    seconds, issuing = [], []
    for expert in cold[:8]:
        _wait()
        begin = time.perf_counter()
        wrapper.promote(expert, stream)
        issuing.append(time.perf_counter() - begin)
        _wait()
        seconds.append(time.perf_counter() - begin)
        wrapper.demote(expert, stream)
    wrapper.close()
    plain: dict[str, float | None] = {}
    for name in ("pinned", "pageable"):
        source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=name == "pinned" and on_gpu())
        target = torch.empty(nbytes, dtype=torch.uint8, device=device())
        times = []
        for _ in range(5):
            _wait()
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            _wait()
            times.append(time.perf_counter() - begin)
        plain[name] = nbytes / min(times) if on_gpu() else None
    points.add(
        "moves",
        nbytes=nbytes,
        rate=nbytes / statistics.median(seconds) if on_gpu() else None,
        issue_us=1e6 * statistics.median(issuing) if on_gpu() else None,
        pinned_rate=plain["pinned"],
        pageable_rate=plain["pageable"],
    )


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def launches(points: Points, model: Model, backend: str) -> None:
    """Of one token without a hot expert: what the four kernels cost when they have nothing to do,
    one by one from Python and in a graph."""
    nobody = torch.zeros(model.experts, dtype=torch.bool)
    nobody[-1] = True
    wrapper = layer(model, nobody, backend)
    slots = wrapper._hot.experts if wrapper._hot is not None else None
    assert slots is not None
    batch = random_batches(model, 1, device())[0]
    ids = torch.zeros_like(batch.ids)  # expert 0 is on the CPU

    def run() -> torch.Tensor:
        rows = slots.rows(batch.x, ids)
        return slots.combine(rows, ids, batch.weights, None, slots.slot_of)

    graph_us = time_us([run] * 8)
    host_us = None
    if on_gpu():
        _wait()
        begin = time.perf_counter()
        for _ in range(200):
            run()
        host_us = (time.perf_counter() - begin) / 200 * 1e6
    points.add("launches", kernels=4, graph_us=graph_us, host_us=host_us)
    wrapper.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", help="write JSON lines there")
    points = Points(parser.parse_args().points)
    backend = "cute" if on_gpu() else "torch"
    model = replace(MODELS[0] if on_gpu() else MODELS[0].small(), experts=EXPERTS)
    mask = torch.arange(model.experts) % 4 == 0
    launches(points, model, backend)
    moves(points, model, mask, backend)
    halves(points, model, mask, backend)
    print("hybrid layer measured" if on_gpu() else "rehearsed: not measured without a GPU")


if __name__ == "__main__":
    main()
