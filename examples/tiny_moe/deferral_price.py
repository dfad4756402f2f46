"""What deferred experts cost in perplexity, and what they buy in speed.

    python deferral_price.py --model model --json price.json

With depth n, the n experts of least weight of each token are added one MoE layer later
(`hybrid_moe.runtime.deferral`). In decode every step has one token, so which experts those are is
each token's own matter, and a text can be read in windows all the same: `Deferring` takes the place
of a layer's experts and carries a sum for each token to the next layer. The speed is that of the
timeline, for a GPU whose attention takes 30 % of a step and a CPU that reads all experts.

Texts: the held-out books, and the documentation of this repository, which is of another kind than
all that the model has read.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import CACHE, read_books
from evaluate import Perplexity, hybrid_model, perplexity
from transformers import AutoTokenizer

from hybrid_moe.schedule.layer_times import LayerTimes
from hybrid_moe.schedule.timeline import run_step

log = logging.getLogger("tiny_moe.deferral_price")

DOCS = Path(__file__).parents[2] / "docs"
ATTENTION = 0.3
"""Of a step without deferral, on the GPU."""


class Carried:
    """Sums on their way from one layer to the next, of one pass."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None


class Deferring(torch.nn.Module):
    """A layer's experts with the least important ones of each token one layer later.

    Args:
        experts: the module in whose place this is: (hidden, ids, weights) -> like hidden.
        depth: experts of each token that come later; 0 in the last layer.
        carried: shared by the layers of a model.
    """

    def __init__(self, experts: torch.nn.Module, depth: int, carried: Carried) -> None:
        super().__init__()
        self.experts, self.depth, self.carried = experts, depth, carried

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [..., H], ids [S, k], weights [S, k] -> like hidden."""
        incoming, self.carried.sum = self.carried.sum, None
        if not self.depth:
            output = self.experts(hidden, ids, weights)
        else:
            rank = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            later = rank >= weights.shape[1] - self.depth
            output = self.experts(hidden, ids, weights.masked_fill(later, 0))
            self.carried.sum = self.experts(hidden, ids, weights.masked_fill(~later, 0))
        return output if incoming is None else output + incoming


@contextmanager
def deferring(model: Any, depth: int) -> Iterator[None]:
    """Within, the model's decode layers defer `depth` experts of each token.

    Raises:
        ValueError: more than a token has.
    """
    top_k = model.config.num_experts_per_tok
    if not 0 <= depth <= top_k:
        raise ValueError(f"depth is {depth}, must be from 0 to the {top_k} experts of a token")
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    given, carried = [block.experts for block in blocks], Carried()
    for at, block in enumerate(blocks):
        last = at == len(blocks) - 1
        block.experts = Deferring(given[at], 0 if last else depth, carried)
    try:
        yield
    finally:
        for block, experts in zip(blocks, given, strict=True):
            block.experts = experts


def speed(top_k: int, depth: int, layers: int) -> float:
    """Of a step with so many deferred experts, over one without."""

    def seconds(count: int) -> float:
        expert = (1 - ATTENTION) / top_k
        layer = (expert * (top_k - count), expert * count)
        step = [
            LayerTimes(at, before=ATTENTION, cpu=layer[0], deferred=layer[1])
            for at in range(layers - 1)
        ]
        return run_step([*step, LayerTimes(layers, before=ATTENTION, cpu=1 - ATTENTION)]).seconds

    return seconds(0) / seconds(depth)


@dataclass(frozen=True)
class Price:
    """Of one depth. `texts`: name -> perplexity. `speed`: over depth 0, of a model of 48 layers."""

    depth: int
    texts: dict[str, Perplexity]
    speed: float


def price_table(prices: list[Price]) -> str:
    """Markdown: a row for each depth."""
    names = list(prices[0].texts)
    lines = [f"| deferred | {' | '.join(names)} | speed |", "|---:|" + "---:|" * (len(names) + 1)]
    for p in prices:
        cells = []
        for name in names:
            value, base = p.texts[name].per_token, prices[0].texts[name].per_token
            cells.append(f"{value:.3f} ({value / base - 1:+.2%})" if p.depth else f"{value:.3f}")
        lines.append(f"| {p.depth} | {' | '.join(cells)} | {p.speed:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--windows", type=int, help="windows of each text; all by default")
    parser.add_argument("--layers", type=int, default=48, help="of the model whose speed is shown")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the packages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    texts = dict(read_books("heldout", args.cache))
    texts["documentation"] = "\n".join(p.read_text("utf-8") for p in sorted(DOCS.glob("*.md")))
    model, tokenizer = hybrid_model(args.model), AutoTokenizer.from_pretrained(args.model)
    top_k = model.config.num_experts_per_tok
    prices = []
    for depth in range(top_k + 1):
        with deferring(model, depth):
            found = {
                name: perplexity(model, tokenizer, text, limit=args.windows)
                for name, text in texts.items()
            }
        prices.append(Price(depth, found, speed(top_k, depth, args.layers)))
        log.info("%d deferred: %s", depth, {n: round(p.per_token, 3) for n, p in found.items()})
    print(price_table(prices))
    if args.json:
        args.json.write_text(json.dumps([asdict(p) for p in prices], indent=2) + "\n")


if __name__ == "__main__":
    main()
