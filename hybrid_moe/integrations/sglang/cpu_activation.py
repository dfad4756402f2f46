"""`HYBRID_MOE_CPU_ACTIVATION`: what the CPU multiplies experts of integer weights by."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hybrid_moe.formats.activation import activation_bits

VARIABLE = "HYBRID_MOE_CPU_ACTIVATION"
"""Environment variable: `int8` for inputs of 8 bits; without it they have 16."""


def chosen(environ: Mapping[str, str] = os.environ) -> str | None:
    """`cpu_activation` of the layers' `KTMoEWrapper`.

    Raises:
        ValueError: neither `int8` nor nothing.
    """
    name = environ.get(VARIABLE) or None
    try:
        activation_bits(name)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error
    return name
