"""Routing profile and metrics of a hybrid layer in a CUDA graph, beside the ids that were given.

    python -m bench.gpu_check.counts [--replays 64]

One graph serves prefill and decode: the phase is a word that is written between its replays.
Without a GPU the steps run one by one, with the torch back end. `bench.gpu_check.replays` does
these checks too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from bench.gpu_check.clock import device, on_gpu
from bench.gpu_check.hybrid import layer, step
from bench.gpu_check.replays import captured, other
from bench.gpu_check.workload import MODELS, Batch, Model, random_batches
from hybrid_moe import check_errors, metrics
from hybrid_moe.placement.routing_profile import PHASES, RoutedModel
from hybrid_moe.placement.routing_recorder import RoutingRecorder


def check(model: Model, tokens: int, replays: int) -> str:
    """Replays with other ids each; what was counted, as a sentence.

    Raises:
        SystemExit: a count is wrong.
    """
    mask = torch.arange(model.experts) % 4 == 0
    hybrid = layer(model, mask, "cute" if on_gpu() else "torch")
    recorder = RoutingRecorder(RoutedModel("", model.hidden, model.experts, model.top_k, (0,)))
    recorder.prepare({0: device()})
    first = random_batches(model, tokens, device())[0]
    static = Batch(first.x.clone(), first.ids.clone(), first.weights.clone())
    run = step(hybrid, static)

    def counted() -> object:
        recorder.add(0, static.ids)
        return run()

    replay = captured(counted, torch.empty_like(static.x))
    recorder.reset()
    before = metrics()
    expected = np.zeros((len(PHASES), model.experts), np.int64)
    hot = mask.numpy()
    for turn in range(replays):
        phase = turn % 2
        static.ids.copy_(other(first, model.experts, turn).ids)
        recorder.set_phase(PHASES[phase])
        replay()
        expected[phase] += np.bincount(static.ids.cpu().flatten(), minlength=model.experts)
    if on_gpu():
        torch.cuda.synchronize()
    check_errors()
    profile, done = recorder.profile(), metrics() - before
    hybrid.close()
    for what, found, right in (
        ("the profile's counts", profile.by_phase[:, 0], expected),
        ("tokens of the phases", profile.tokens, expected.sum(1) // model.top_k),
        ("hot pairs", done.hot_pairs, expected[:, hot].sum()),
        ("cold pairs", done.cold_pairs, expected[:, ~hot].sum()),
    ):
        if not np.array_equal(found, right):
            raise SystemExit(f"{tokens} tokens: {what} are {found}, must be {right}")
    return (
        f"{tokens} tokens: {replays} replays counted, hit rate {100 * (done.hit_rate or 0):.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=64)
    args = parser.parse_args()
    model = replace(MODELS[2].small(), hidden=512, intermediate=256, experts=32, top_k=4)
    found = [check(model, tokens, args.replays) for tokens in (1, 5)]
    print("; ".join(found) + ("" if on_gpu() else " (rehearsed without graphs)"))


if __name__ == "__main__":
    main()
