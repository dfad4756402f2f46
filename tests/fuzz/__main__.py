"""Both fuzzers in turn, for hours: `python -m tests.fuzz --seed S`; Ctrl-C ends it.

Each says what repeats a failure alone.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.fuzz import loaders, wrapper


def run(seed: int, inputs: int, calls: int, turns: float = float("inf")) -> bool:
    """Turns of `inputs` inputs of the loaders and `calls` calls of wrappers.

    Returns:
        Whether all was right. A wrapper that is wrong raises.
    """
    turn, episodes = 0, 0
    while turn < turns:
        with tempfile.TemporaryDirectory() as folder:
            report = loaders.run(turn * inputs, inputs, seed, Path(folder))
        print(f"loaders, seed {seed}, inputs from {turn * inputs}: {report}", flush=True)
        for number, kind, text in report.failures:
            print(f"--- input {number} ({kind}):\n{text}", file=sys.stderr)
        if report.failures or report.interrupted:
            return not report.failures
        done = wrapper.run(seed + episodes, calls)
        episodes += done["episodes"]
        print(f"wrappers, seeds to {seed + episodes - 1}: {dict(done)}", flush=True)
        turn += 1
    return True


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of the loaders, each turn")
    parser.add_argument("--calls", type=int, default=10_000, help="of wrappers, each turn")
    parser.add_argument("--turns", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    logging.disable()
    with suppress(KeyboardInterrupt):
        sys.exit(not run(options.seed, options.inputs, options.calls, options.turns))


if __name__ == "__main__":
    main()
