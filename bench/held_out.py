"""What was chosen on some texts, measured on texts that had no part in it.

    python bench/held_out.py                        # three tables, about a minute
    python bench/held_out.py --record BOOKS         # record the traces anew with the small model

    placements   from the first half of a text's profile, on its second half
    topics       online placement (`online_placement`) behind changes of text
    regret       the scheduler's decisions (`regret`), a quarter of the experts hot, chosen by the
                 tokens before those that are decided

The constants of online placement and of the scheduler were chosen on the traces of those two
benchmarks. Those here are of other pages, and one of another kind of text; nothing was chosen on
them. BOOKS is the folder that `examples/tiny_moe/corpus.py --out BOOKS` writes.
"""

from __future__ import annotations

import argparse
import itertools
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from online_placement import Change, after_change
from regret import (
    MACHINES,
    TRACES,
    RoutingTrace,
    load_trace,
    model_and_tokenizer,
    regret,
    run,
    save_trace,
)
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hybrid_moe.placement.cost_placement import place_by_cost
from hybrid_moe.placement.routed_costs import expected_use, layer_cost
from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.placement.routing_profile_file import read_routing_profile
from hybrid_moe.placement.strategies import place_experts
from hybrid_moe.schedule.layer_work import ExpertWork, GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates

ROOT = Path(__file__).resolve().parent.parent
PROFILES = sorted((ROOT / "examples" / "tiny_moe" / "profiles").glob("*.json"))
FOLDER = TRACES / "held_out"

TOPICS = ("persuasion", "tom_sawyer", "licence", "python")
"""The second halves of two novels, the GNU General Public License, and `tokenize` of Python's
standard library."""

TOKENS, DECIDED = 2048, 256
"""Of a trace, and those at its end of which the scheduler decides."""

HOT = 4
"""Of 16 experts."""

EXPERT = ExpertWork(13.2e6, 13.2e6, 24.9e6, one_token_rate=4e11, many_tokens_rate=5e11)
"""The small model's experts are 53 KB, which no GPU is bought for: these are gpt-oss's."""

RATES = MachineRates(56e9, 700e9, 28e12, submit=50e-6, back=50e-6)

Mask = npt.NDArray[np.bool_]


def halves(profile: RoutingProfile) -> tuple[RoutingProfile, npt.NDArray[np.int64]]:
    """A profile of the first half of the time, and the counts [L, E] of the second."""
    middle = len(profile.windows) // 2
    assert middle >= 2
    counts = np.zeros((3, *profile.shape), np.int64)
    counts[2] = profile.windows[:middle].sum(0)
    tokens = np.array([0, 0, profile.window_tokens[:middle].sum()])
    return RoutingProfile(profile.model, counts, tokens), profile.windows[middle:].sum(0)


def hot_by_cost(profile: RoutingProfile, experts: int) -> Mask:
    """The placement `cost` of so many experts."""
    costs = [
        layer_cost(LayerWork(layer, GpuAmount(), expert=EXPERT), use, 1, RATES)
        for layer, use in zip(profile.model.layers, expected_use(profile), strict=True)
    ]
    masks = place_by_cost(costs, experts).masks
    return np.stack([masks[layer] for layer in profile.model.layers])


def placements(profile: RoutingProfile) -> dict[str, tuple[Mask, float]]:
    """Of each strategy the placement from the first half of the time, a quarter of the experts hot,
    and its hit rate in the second."""
    seen, unseen = halves(profile)
    L, E = seen.shape
    experts = L * E // 4
    masks = {
        "uniform": place_experts("uniform", L, E, experts).numpy(),
        "frequency": place_experts("frequency", L, E, experts, activation_freq=seen.counts).numpy(),
        "cost": hot_by_cost(seen, experts),
    }
    return {name: (mask, float(unseen[mask].sum() / unseen.sum())) for name, mask in masks.items()}


def read_topic(name: str) -> RoutingTrace:
    """A recorded trace; weights are of its last tokens only, those before have zeros."""
    return load_trace(FOLDER / f"{name}.npz")


def changes() -> Iterator[tuple[str, str, Change]]:
    """Each change of text."""
    for one, other in itertools.permutations(TOPICS, 2):
        yield one, other, after_change(read_topic(one).ids, read_topic(other).ids, HOT)


def decided(name: str) -> tuple[RoutingTrace, Mask]:
    """The end of a trace, and the experts that were most used before it."""
    trace = read_topic(name)
    before = trace.part(slice(TOKENS - DECIDED))
    return trace.part(slice(TOKENS - DECIDED, TOKENS)), before.hot(HOT / trace.num_experts)


def texts(books: Path) -> dict[str, str]:
    """What is recorded."""
    novels = {name: (books / f"{name}.txt").read_text("utf-8") for name in TOPICS[:2]}
    return {
        **{name: text[len(text) // 2 :] for name, text in novels.items()},
        "licence": Path("/usr/share/common-licenses/GPL-3").read_text("utf-8"),
        "python": Path(tokenize.__file__).read_text("utf-8"),
    }


def record(books: Path) -> None:
    """Run the small model over the texts, 512 tokens at a time, and write what its routers chose;
    weights of the last tokens only, which are most of a file."""
    model, tokenizer = model_and_tokenizer()
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts(books).items():
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        assert tokens.shape[1] == TOKENS, f"{name} has {tokens.shape[1]} tokens"
        traces = [run(model, part) for part in tokens.split(512, dim=1)]
        ids, weights, agreed = (
            np.concatenate([getattr(trace, field) for trace in traces])
            for field in ("ids", "weights", "agreed")
        )
        weights[: TOKENS - DECIDED] = 0
        save_trace(
            FOLDER / f"{name}.npz", RoutingTrace(ids, weights, traces[0].num_experts, agreed)
        )


def main() -> None:
    """Record, or print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="BOOKS", help="run the small model first")
    if books := parser.parse_args().record:
        record(books)
    console = Console(width=100)
    table = Table("percent hot", "uniform", "frequency", "cost")
    for file in PROFILES:
        found = placements(read_routing_profile(file))
        table.add_row(file.stem, *(f"{100 * rate:.1f}" for _, rate in found.values()))
    console.print(table)
    table = Table("from", "to", "stays", "online", "optimum", "online / optimum", "swaps", "after")
    for one, other, change in changes():
        rates = (change.stays, change.online, change.optimum, change.online / change.optimum)
        swaps = (change.swaps, change.swaps_settled)
        table.add_row(one, other, *(f"{rate:.3f}" for rate in rates), *map(str, swaps))
    console.print(table)
    table = Table("regret", "tokens", "deferred", *TOPICS)
    for machine, batch, depth in tqdm(list(itertools.product(MACHINES, (1, 4), (0, 2)))):
        lost = []
        for name in TOPICS:
            trace, hot = decided(name)
            lost.append(regret(trace, hot, MACHINES[machine], batch=batch, max_deferred=depth)[0])
        table.add_row(machine, f"{batch}", f"{depth}", *(f"{share:.1%}" for share in lost))
    console.print(table)


if __name__ == "__main__":
    main()
