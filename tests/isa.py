"""Other processors than this one: `pytest --isa TIER` runs tests as on a machine of that tier.

    python -m tests.isa            # the tiers that `make test-tiers` runs besides this machine's
    python -m tests.isa --kinds    # one of each kind

A tier that this processor can run is the most capable that the tests see: the features beyond it
are hidden, and HYBRID_MOE_ISA names it for the processes that tests start. Any other tier runs with
its missing instructions emulated (tests/cpu_kernels/emulation.py), in the tests' own process only.
Tests that are parametrized over tiers run for this one.
"""

from __future__ import annotations

import functools
import os
import sys

from hybrid_moe.cpu_kernels.dsl import tiers
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, TierReport, available_tiers, choose_tier
from hybrid_moe.cpu_kernels.kernels.format_kernels import sums_integers
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat

EMULATED = ("avx512_bf16", "amx")
"""Tiers of kinds that differ in what tests see: a dot product that flushes subnormals, a matrix
unit. Where the processor lacks them, they are tried by emulation."""


def others() -> list[str]:
    """Tiers to try besides the one that this machine chooses, least capable first."""
    usable = [report.tier.name for report in available_tiers() if report.usable]
    best = choose_tier().name
    return [name for name in usable if name != best] + [n for n in EMULATED if n not in usable]


def kinds() -> list[str]:
    """Of these, one of each kind of arithmetic: no vectors, bytes summed in 16 bits, `EMULATED`.
    Others differ from them in single ops, which `tests/cpu_kernels/dsl` has on every tier."""
    return [name for name in others() if name in ("portable", "avx2", *EMULATED)]


def repeats(fmt: object, name: object) -> bool:
    """Whether a format's kernels on a tier are line for line those of the tier that it extends, as
    it lowers none of their ops in another way (`test_isa` holds that against the kernels)."""
    tier = TIERS.get(name) if isinstance(name, str) else None
    below = tier.extends if tier else None
    if not isinstance(fmt, WeightFormat) or tier is None or below is None or tier.tiles:
        return False
    if (tier.vector_bits, tier.registers) != (below.vector_bits, below.registers):
        return False
    of_pairs = {"pair_dot"}
    if fmt is BF16:
        return of_pairs.isdisjoint(tier.lowerings)
    return sums_integers(fmt) and of_pairs.issuperset(tier.lowerings)


def simulate(name: str) -> None:
    """Make this process's machine one of tier `name`, until it ends.

    Raises:
        ValueError: no such tier.
    """
    if name not in TIERS:
        raise ValueError(f"--isa {name}: no such tier; there are {', '.join(TIERS)}")
    tier, host = TIERS[name], tiers.host_features()
    if tier.all_features <= host:
        os.environ["HYBRID_MOE_ISA"] = name
        tiers.host_features = functools.cache(lambda: tier.all_features)
        return
    from tests.cpu_kernels.emulation import QUICK  # which asks what this processor really has

    real, features = tiers.available_tiers, tiers.host_features

    def with_emulated() -> list[TierReport]:
        """One more, unless a test has put features of its own in the processor's place."""
        more = [TierReport(QUICK[name], ())] if tiers.host_features is features else []
        return [*real(), *more]

    tiers.available_tiers = with_emulated


if __name__ == "__main__":
    print(*(kinds() if "--kinds" in sys.argv else others()))
