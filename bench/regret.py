"""How much longer steps take by the scheduler's decisions than by the best ones.

    python bench/regret.py                       # the recorded traces, several machines
    python bench/regret.py --record              # record the traces anew with the small model

A trace is which experts each token of a text took in each layer of the small model
(examples/tiny_moe), and with what weights: real routing. Bytes and speeds are those of a large
model on machines of several kinds, so that sending and deferring are worth deciding. The optimum
knows the routing of all layers of a step, and tries every choice (`schedule.offline_optimum`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hybrid_moe.schedule.layer_demand import LayerDemand, demand_of
from hybrid_moe.schedule.layer_work import ExpertWork, GpuAmount, LayerWork
from hybrid_moe.schedule.machine_rates import MachineRates
from hybrid_moe.schedule.offline_optimum import shortest_step
from hybrid_moe.schedule.step_scheduler import StepScheduler

ROOT = Path(__file__).resolve().parent.parent
TRACES = ROOT / "bench" / "traces"
TOKENS = 256
"""Of each trace."""

TEXTS: Mapping[str, str | None] = MappingProxyType(
    {"prose": None, "markdown": "docs/numerics.md", "python": "hybrid_moe/wrapper.py"}
)
"""Name of a trace -> the file whose beginning it reads; None: what the model writes itself."""

_STREAM = {"submit": 15e-6, "back": 15e-6, "launch": 60e-6, "transfer": 10e-6}
MACHINES: Mapping[str, MachineRates] = MappingProxyType(
    {
        "2 channels, PCIe 4": MachineRates(60e9, 700e9, 60e12, link=25e9, memory=75e9, **_STREAM),
        "2 channels, PCIe 5": MachineRates(70e9, 1300e9, 80e12, link=55e9, memory=90e9, **_STREAM),
        "8 channels, PCIe 4": MachineRates(130e9, 700e9, 60e12, link=25e9, **_STREAM),
        "12 channels, no link": MachineRates(350e9, 1300e9, 80e12, **_STREAM),
    }
)

EXPERT = ExpertWork(13.4e6, 13.4e6, 25.2e6, 1.5e12, 1.2e12)
"""DeepSeek-V4-Flash's: 4096 x 2048, MXFP4."""


def works(layers: int) -> list[LayerWork]:
    """Layers with 70 MB of attention and a shared expert."""
    return [LayerWork(n, GpuAmount(70e6), GpuAmount(13.4e6), EXPERT) for n in range(layers)]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Attributes:
    ids: int [T, L, k], experts of each token.
    weights: float [T, L, k].
    num_experts: E.
    agreed: bool [T], a draft of the first layer alone chooses the same next token as the model.
    """

    ids: np.ndarray
    weights: np.ndarray
    num_experts: int
    agreed: np.ndarray

    def part(self, tokens: slice) -> RoutingTrace:
        """Some of the tokens."""
        ids, weights, agreed = (field[tokens] for field in (self.ids, self.weights, self.agreed))
        return RoutingTrace(ids, weights, self.num_experts, agreed)

    def hot(self, share: float) -> np.ndarray:
        """bool [L, E]: the most used experts of each layer."""
        mask = np.zeros((self.ids.shape[1], self.num_experts), bool)
        count = round(share * self.num_experts)
        for layer, row in enumerate(mask):
            use = np.bincount(self.ids[:, layer].ravel(), minlength=self.num_experts)
            row[np.argsort(-use, kind="stable")[:count]] = True
        return mask

    def steps(self, batch: int, hot: np.ndarray, max_deferred: int) -> Iterator[list[LayerDemand]]:
        """Demands of every layer, step by step: requests read the trace from places that are as far
        apart as they can be."""
        T, L, _ = self.ids.shape
        for start in range(T // batch):
            rows = start + np.arange(batch) * (T // batch)
            yield [
                demand_of(self.ids[rows, n], self.weights[rows, n], hot[n], max_deferred)
                for n in range(L)
            ]


def load_trace(file: Path) -> RoutingTrace:
    """Of a file of `save_trace`."""
    with np.load(file, allow_pickle=False) as stored:
        return RoutingTrace(
            stored["ids"].astype(np.int64),
            stored["weights"].astype(np.float64),
            int(stored["experts"]),
            stored["agreed"],
        )


def save_trace(file: Path, trace: RoutingTrace) -> None:
    """In few bytes: up to 256 experts, weights rounded to 16 bits."""
    np.savez_compressed(
        file, ids=trace.ids.astype(np.uint8), weights=trace.weights.astype(np.float16),
        experts=trace.num_experts, agreed=trace.agreed,
    )  # fmt: skip


def read_trace(name: str) -> RoutingTrace:
    """A recorded trace."""
    return load_trace(TRACES / f"{name}.npz")


def regret(
    trace: RoutingTrace,
    hot: np.ndarray,
    rates: MachineRates,
    *,
    batch: int = 1,
    max_deferred: int = 0,
    most: int | None = None,
) -> tuple[float, float]:
    """(Decided over best, all on the CPU over best), less 1: sums over steps, `most` at most, with
    the experts of bool [L, E] on the GPU."""
    layers = works(trace.ids.shape[1])
    scheduler = StepScheduler(layers, rates, max_deferred=max_deferred)
    plain = StepScheduler(layers, rates, send=False)
    decided = best = cpu = 0.0
    for number, demands in enumerate(trace.steps(batch, hot, max_deferred)):
        if number == most:
            break
        for demand in demands:
            scheduler.decide(demand)
            plain.decide(demand)
        decided += scheduler.seconds
        cpu += plain.seconds
        best += shortest_step(layers, demands, rates)
    return decided / best - 1, cpu / best - 1


def run(model: Any, tokens: Any) -> RoutingTrace:
    """What the routers choose for int64 [1, T]; a draft is of the first layer alone."""
    import torch

    found: list[tuple[Any, Any]] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [
        gate.register_forward_hook(lambda _module, _args, out: found.append((out[2], out[1])))
        for gate in gates
    ]
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=True)
        draft = model.lm_head(model.model.norm(output.hidden_states[1]))
    for hook in hooks:
        hook.remove()
    agreed = (draft.argmax(-1) == output.logits.argmax(-1))[0]
    ids = torch.stack([chosen for chosen, _ in found], 1)
    weights = torch.stack([score for _, score in found], 1).float()
    return RoutingTrace(ids.numpy(), weights.numpy(), model.config.num_experts, agreed.numpy())


def model_and_tokenizer() -> tuple[Any, Any]:
    """The small model, and its tokenizer."""
    from transformers import AutoTokenizer

    import hybrid_moe

    folder = ROOT / "examples" / "tiny_moe" / "model"
    model: Any = hybrid_moe.from_pretrained(folder, method="MXFP4", progress=False).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def record() -> None:
    """Run the small model over `TEXTS`, and write what its routers chose."""
    import torch

    model, tokenizer = model_and_tokenizer()
    TRACES.mkdir(exist_ok=True)
    for name, file in tqdm(TEXTS.items()):
        text = "It was a truth" if file is None else (ROOT / file).read_text("utf-8")
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        if file is None:
            torch.manual_seed(0)
            length = {"max_length": TOKENS, "min_length": TOKENS}
            with torch.inference_mode():
                tokens = model.generate(tokens, do_sample=True, top_k=40, **length)
        save_trace(TRACES / f"{name}.npz", run(model, tokens))


def main() -> None:
    """Record, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="run the small model first")
    if parser.parse_args().record:
        record()
    table = Table("machine", "tokens", "deferred", "trace", "regret", "all on the CPU")
    cases = [
        (machine, batch, depth, name)
        for machine in MACHINES
        for batch in (1, 4)
        for depth in (0, 2)
        for name in TEXTS
    ]
    for machine, batch, depth, name in tqdm(cases):
        trace = read_trace(name)
        found = regret(trace, trace.hot(0.25), MACHINES[machine], batch=batch, max_deferred=depth)
        table.add_row(machine, f"{batch}", f"{depth}", name, *(f"{value:.1%}" for value in found))
    Console().print(table)


if __name__ == "__main__":
    main()
