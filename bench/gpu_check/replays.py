"""A hybrid layer in a CUDA graph: other ids in every replay, and experts that move between them.

    python -m bench.gpu_check.replays [--moves 1000]

Every replay must give what the same layer gives with all experts on the CPU, within twice the error
that docs/numerics.md allows for each. Without a GPU the steps run one by one, with the torch back
end; then nothing is replayed, and all else is checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from bench.gpu_check.clock import device, on_gpu
from bench.gpu_check.hybrid import layer, step
from bench.gpu_check.workload import MODELS, Batch, Model, random_batches
from hybrid_moe import KTMoEWrapper, check_errors

BOUND = 2 * 0.0030
BATCHES = 16


def captured(run: Callable[[], object], into: torch.Tensor) -> Callable[[], object]:
    """`run` as a replay that leaves its result in `into`; as it is, without a GPU."""

    def once() -> None:
        into.copy_(run())  # type: ignore[arg-type]

    if not on_gpu():
        return once
    once()  # before the capture: kernels are compiled, buffers made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def move(wrapper: KTMoEWrapper, rng: np.random.Generator) -> bool:
    """One expert from one side to the other, to the CPU where no slot is free."""
    hot = wrapper.gpu_experts_mask
    free = int(hot.sum()) <= len(hot) // 4
    ids = ((~hot) if free else hot).nonzero().flatten().tolist()
    stream = torch.cuda.current_stream().cuda_stream if on_gpu() else None
    (wrapper.promote if free else wrapper.demote)(int(rng.choice(ids)), stream)
    return free


def check(model: Model, tokens: int, moves: int) -> str:
    """Moves and replays in turn; what happened, as a sentence.

    Raises:
        SystemExit: a result is wrong.
    """
    mask = torch.arange(model.experts) % 4 == 0
    torch.manual_seed(tokens)
    hybrid = layer(model, mask, "cute" if on_gpu() else "torch", model.experts)
    torch.manual_seed(tokens)
    plain = layer(model, torch.zeros_like(mask), None, model.experts)
    some = random_batches(model, tokens, device())[0]
    batches = [other(some, model.experts, seed) for seed in range(BATCHES)]
    wanted = [plain.forward(*(t.cpu() for t in (b.x, b.ids, b.weights))) for b in batches]
    static = Batch(*(t.clone() for t in (batches[0].x, batches[0].ids, batches[0].weights)))
    out = torch.empty_like(static.x)
    replay = captured(step(hybrid, static), out)
    rng, promoted, worst = np.random.default_rng(tokens), 0, 0.0
    for turn in range(moves):
        promoted += move(hybrid, rng)
        batch, expected = batches[turn % BATCHES], wanted[turn % BATCHES]
        for target, source in ((static.x, batch.x), (static.ids, batch.ids)):
            target.copy_(source)
        static.weights.copy_(batch.weights)
        replay()
        error = float((out.cpu().float() - expected.float()).norm() / expected.float().norm())
        worst = max(worst, error)
        if not error <= BOUND:  # NaN too
            raise SystemExit(f"{tokens} tokens, turn {turn}: error {error:.4f}, at most {BOUND}")
    check_errors()
    hybrid.close()
    plain.close()
    return f"{tokens} tokens: {moves} moves, {promoted} up, largest error {worst:.4f}"


def other(batch: Batch, experts: int, seed: int) -> Batch:
    """A batch of the same sizes with other activations, experts and weights."""
    x = torch.roll(batch.x, 7 * seed, dims=-1)
    return Batch(x, (batch.ids + 3 * seed) % experts, batch.weights.roll(seed, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=1000)
    args = parser.parse_args()
    model = replace(MODELS[2].small(), hidden=512, intermediate=256, experts=32, top_k=4)
    from bench.gpu_check import counts  # which needs this module

    found = [check(model, tokens, args.moves // 2) for tokens in (1, 5)]
    found += [counts.check(model, tokens, 16) for tokens in (1, 5)]
    print("; ".join(found) + ("" if on_gpu() else " (rehearsed without graphs)"))


if __name__ == "__main__":
    main()
