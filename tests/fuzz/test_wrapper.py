"""A short run of the random machine: another seed each time, printed where it fails."""

from __future__ import annotations

import os
import random

from tests.fuzz.wrapper import run

CALLS, SECONDS = 4000, 40.0
"""What one run does at most: so many submissions, or episodes begun in so many seconds."""


def test_random_use_of_wrappers() -> None:
    """`HYBRID_MOE_FUZZ_SEED=S` runs from that seed on, as `python -m tests.fuzz.wrapper --seed S`
    does for longer."""
    seed = int(os.environ.get("HYBRID_MOE_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"seed {seed}")
    done = run(seed, CALLS, SECONDS)
    assert done["compared"] > 0 and done["refused"] > 0, f"seed {seed}: {dict(done)}"
