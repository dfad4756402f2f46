"""What a trace costs: decode of the small model with and without one, in turn.

    python bench/trace_cost.py --seconds 60

Its layers take tens of microseconds, so that a token has more spans for its time than one of any
model that fills a memory. "cost" is the median over rounds of the time of a token with a trace over
that without, less 1, and its standard error.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import parser
from paired import standard_error
from regret import model_and_tokenizer

from hybrid_moe.cpu_kernels.trace import tracing
from hybrid_moe.planning.receipt import receipt, write_receipt

TOKENS, WARM_UP = 28, 4
"""Of a turn, and those of them that do not count: a trace that ends has written a file."""


@dataclass(frozen=True)
class Cost:
    """Microseconds of a token, medians; share of the time that a trace costs, and its error."""

    rounds: int
    off_us: float
    on_us: float
    cost: float
    error: float


def seconds_of_a_token(model: Any, prompt: torch.Tensor) -> float:
    """The median of a turn."""
    seconds = []
    with torch.inference_mode():
        out = model(prompt, use_cache=True)
        for _ in range(TOKENS):
            begin = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[WARM_UP:])


def measure(seconds: float, least: int = 3) -> Cost:
    """Rounds for so many seconds; whoever was first in one is second in the next."""
    model, tokenizer = model_and_tokenizer()
    prompt = tokenizer("It was a truth universally acknowledged", return_tensors="pt").input_ids
    seconds_of_a_token(model, prompt)  # threads start
    off, on = list[float](), list[float]()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for count in itertools.count():
            if count >= least and time.monotonic() > end:
                break
            for traced in (False, True) if count % 2 else (True, False):
                trace = tracing(Path(folder) / "trace.json") if traced else contextlib.nullcontext()
                with trace:
                    (on if traced else off).append(seconds_of_a_token(model, prompt))
    costs = [with_one / without - 1 for with_one, without in zip(on, off, strict=True)]
    off_us, on_us = (1e6 * statistics.median(turns) for turns in (off, on))
    return Cost(len(costs), off_us, on_us, statistics.median(costs), standard_error(costs))


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60)
    args = options.parse_args()
    found = measure(args.seconds)
    print(
        f"a token of the small model: {found.off_us:.0f} us, with a trace {found.on_us:.0f} us; "
        f"it costs {100 * found.cost:.1f} % +- {100 * found.error:.1f} % ({found.rounds} rounds)"
    )
    write_receipt(args.json, receipt("trace_cost", **asdict(found)))


if __name__ == "__main__":
    main()
