"""Random machine for `KTMoEWrapper`: `python -m tests.fuzz.wrapper --calls N --seed S`.

An episode is some models of random sizes, formats and tiers, used in turns by one thread or each
by a thread of its own. Every output is compared with the float64 reference and its derived bound,
every error with what the oracle says. An episode is made from its seed alone, which is printed if
it fails: `--seed S --calls 1` runs it again.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.model import Model

CALLS_PER_MODEL = 150


def run_episode(seed: int, calls: Counter[str]) -> None:
    """The episode of `seed`; raises what is wrong."""
    rng = random.Random(seed)
    cores = min(2, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(rng.random() < 0.5):
        models = []
        for at in range(rng.choice((1, 1, 2, 3))):
            own = Path(folder) / str(at)
            own.mkdir()
            models.append(Model(random.Random(rng.getrandbits(64)), own, cores, Counter()))
        if rng.random() < 0.3:
            _in_threads(models)
        else:
            while any(m.calls["calls"] < CALLS_PER_MODEL for m in models):
                rng.choice(models).act()
        for model in models:
            calls.update(model.calls)
            for layer in model.oracle.layers.values():
                layer.wrapper.close()


def _in_threads(models: list[Model]) -> None:
    """Each model used by a thread of its own."""
    failures: list[BaseException] = []

    def use(model: Model) -> None:
        try:
            while model.calls["calls"] < CALLS_PER_MODEL and not failures:
                model.act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run(seed: int, calls: int, seconds: float = float("inf")) -> Counter[str]:
    """Episodes of `seed`, `seed` + 1, ... until so many calls are done or the time is over.

    Returns:
        How much was done, by kind: "calls" submissions, "compared" outputs, "episodes", ...
    """
    done: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while done["calls"] < calls and time.monotonic() < end:
        try:
            run_episode(seed + done["episodes"], done)
        except Exception:
            print(f"seed {seed + done['episodes']} failed", flush=True)
            raise
        done["episodes"] += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    start = time.monotonic()
    done = run(options.seed, options.calls)
    seconds = time.monotonic() - start
    print(f"{dict(done)} in {seconds:.0f} s, {done['calls'] / seconds:.0f} calls/s")


if __name__ == "__main__":
    main()
