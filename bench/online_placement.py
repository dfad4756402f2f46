"""Online placement on recorded routing: how soon experts follow a change of topic.

    python bench/online_placement.py record --out FILE.npz NAME=TEXT.txt ...    # once
    python bench/online_placement.py topics [--trace FILE.npz]

`record` runs texts through the small model of examples/tiny_moe and keeps which experts each token
chose: an array uint8 [tokens, layers, k] for each text. `topics` replays one text after another,
token by token, with a quarter of the experts on the GPU: those that were best for the text before.
Shown are the hit rates of

    stays    the placement at the change of topic, if it does not move
    online   `OnlinePlacement` from there on
    optimum  the best that does not move, chosen knowing the tokens that are counted

from 500 tokens behind the change on, and how much was moved until then and after.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.placement.online import OnlineOptions, OnlinePlacement

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_moe" / "model"
TRACE = ROOT / "tests" / "hybrid_moe" / "placement" / "routing_trace.npz"
EXPERTS = 16
SETTLED = 500
"""Tokens behind a change of topic, from which hit rates are compared."""

Trace = npt.NDArray[np.uint8]
"""[tokens, layers, k] experts."""


class ReplayedLayer:
    """A layer without weights: counts what is routed, and moves at no cost."""

    def __init__(self, index: int, hot: npt.NDArray[np.bool_], top_k: int, nbytes: int) -> None:
        self.layer_idx, self.num_experts, self.num_experts_per_tok = index, len(hot), top_k
        self.routed: npt.NDArray[np.int64] = np.zeros(len(hot), np.int64)
        self.elsewhere = torch.zeros(len(hot), dtype=torch.bool)
        self.gpu_experts_mask = torch.from_numpy(hot.copy())
        self.gpu_slots, self.slot_nbytes, self.keeps_panels = int(hot.sum()), nbytes, False
        self.prefill_stream = None

    def promote(self, expert: int, cuda_stream: int | None = None) -> None:
        self.gpu_experts_mask[expert] = True

    def demote(self, expert: int, cuda_stream: int | None = None) -> None:
        self.gpu_experts_mask[expert] = False


def counts_of(trace: Trace) -> npt.NDArray[np.int64]:
    """[layers, experts] pairs."""
    return np.stack(
        [np.bincount(trace[:, at].ravel(), minlength=EXPERTS) for at in range(trace.shape[1])]
    )


def best(trace: Trace, hot: int) -> npt.NDArray[np.bool_]:
    """[layers, experts], the most used ones of each layer: no placement that does not move has a
    better hit rate on these tokens."""
    order = np.argsort(-counts_of(trace), axis=1, kind="stable")
    made = np.zeros(order.shape, np.bool_)
    np.put_along_axis(made, order[:, :hot], True, axis=1)
    return made


def hit_rate(trace: Trace, hot: npt.NDArray[np.bool_]) -> float:
    """Of a placement that does not move."""
    counts = counts_of(trace)
    return float(counts[hot].sum() / counts.sum())


@dataclass(frozen=True)
class Change:
    """What followed a change of topic. Rates are of the tokens from `SETTLED` on."""

    stays: float
    online: float
    optimum: float
    swaps: int
    swaps_settled: int
    returns: int


def after_change(
    before: Trace, after: Trace, hot: int, options: OnlineOptions | None = None
) -> Change:
    """Replay `after` from the placement that was best for `before`, which has been replayed too.

    Args:
        hot: experts of each layer on the GPU.
    """
    placement = best(before, hot)
    layers = [
        ReplayedLayer(at, row, before.shape[2], nbytes=400_000) for at, row in enumerate(placement)
    ]
    online = OnlinePlacement(layers, options, clock=itertools.count().__next__)

    def replay(trace: Trace) -> None:
        for token in trace:
            for layer, ids in zip(layers, token, strict=True):
                layer.routed[ids] += 1
            online.step()

    replay(before)
    begun = online.report()
    layouts = np.stack([layer.gpu_experts_mask.numpy() for layer in layers])
    replay(after[:SETTLED])
    settling = online.report()
    hits = 0
    for token in after[SETTLED:]:
        for layer, ids in zip(layers, token, strict=True):
            hits += int(layer.gpu_experts_mask.numpy()[ids].sum())
            layer.routed[ids] += 1
        online.step()
    rest, end = after[SETTLED:], online.report()
    return Change(
        stays=hit_rate(rest, layouts),
        online=hits / rest.size,
        optimum=hit_rate(rest, best(rest, hot)),
        swaps=settling.swaps - begun.swaps,
        swaps_settled=end.swaps - settling.swaps,
        returns=end.returns - begun.returns,
    )


def record(texts: Mapping[str, str], tokens: int) -> dict[str, Trace]:
    """The experts that the small model chooses for the first `tokens` of each text."""
    from transformers import AutoTokenizer

    import hybrid_moe

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = hybrid_moe.from_pretrained(MODEL, dense="torch", progress=False)
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    chosen: list[list[torch.Tensor]] = [[] for _ in gates]
    for at, gate in enumerate(gates):
        gate.register_forward_hook(lambda _m, _a, out, at=at: chosen[at].append(out[2]))
    found = {}
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens]
        for layer in chosen:
            layer.clear()
        with torch.inference_mode():
            for part in ids.split(512):
                model(input_ids=part[None])
        layers = [torch.cat(layer) for layer in chosen]
        found[name] = torch.stack(layers, 1).to(torch.uint8).numpy()
    return found


def _record(arguments: Any) -> None:
    texts = {}
    for given in arguments.texts:
        name, _, file = given.partition("=")
        texts[name] = Path(file).read_text(encoding="utf-8")
    traces = record(texts, arguments.tokens)
    np.savez_compressed(arguments.out, **traces)  # type: ignore[arg-type]
    print({name: trace.shape for name, trace in traces.items()})


def _topics(arguments: Any) -> None:
    with np.load(arguments.trace) as stored:
        traces = {name: stored[name] for name in stored.files}
    print(f"hit rates with {arguments.hot} of {EXPERTS} experts hot, from token {SETTLED} on")
    print(f"{'from':>10} {'to':>10}  stays  online  optimum  online/optimum  swaps  after  back")
    for one, other in itertools.permutations(traces, 2):
        change = after_change(traces[one], traces[other], arguments.hot)
        print(
            f"{one:>10} {other:>10}  {change.stays:.3f}  {change.online:.3f}   "
            f"{change.optimum:.3f}    {change.online / change.optimum:.3f}           "
            f"{change.swaps:3d}    {change.swaps_settled:3d}    {change.returns:3d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="run texts through the small model")
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--tokens", type=int, default=2048)
    recording.add_argument("texts", nargs="+", metavar="NAME=FILE")
    recording.set_defaults(run=_record)
    topics = commands.add_parser("topics", help="hit rates behind changes of topic")
    topics.add_argument("--trace", type=Path, default=TRACE)
    topics.add_argument("--hot", type=int, default=EXPERTS // 4)
    topics.set_defaults(run=_topics)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
