"""How exact decode is: `HYBRID_MOE_QUALITY=exact|balanced`.

Deferred experts are added one layer later (`runtime.deferral`): the CPU computes them while the GPU
is at the next layer's attention, and a token's numbers are not those of the model any more. What
that costs in perplexity, docs/scheduling.md has for each depth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "HYBRID_MOE_QUALITY"
"""Environment variable: `exact` or `balanced`."""

EXACT, BALANCED = "exact", "balanced"
QUALITIES = (EXACT, BALANCED)
"""Nothing is deferred; a quarter of a token's experts, those of least weight, are."""


def quality(environ: Mapping[str, str] = os.environ) -> str:
    """What the variable says; `exact` where it is not set.

    Raises:
        ValueError: there is no such quality.
    """
    return quality_named(environ.get(VARIABLE) or EXACT, f"{VARIABLE}=")


def quality_named(name: str, option: str) -> str:
    """`name`, checked; `option` is how the message says where it comes from."""
    if name not in QUALITIES:
        raise ValueError(f"{option}{name}: must be {' or '.join(QUALITIES)}")
    return name


def deferral_depth(name: str, top_k: int) -> int:
    """Experts of a token that are deferred."""
    return 0 if name == EXACT else top_k // 4
