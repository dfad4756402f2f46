"""`HYBRID_MOE_GPU`: the experts on the GPU are this package's too, and SGLang allocates none."""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "HYBRID_MOE_GPU"
"""Environment variable: who computes the experts on the GPU; without it, SGLang."""

DYNAMIC = "HYBRID_MOE_DYNAMIC"
"""Environment variable: experts change places between steps, see `dynamic`."""

BACKENDS = {"cute": "this package's kernels", "torch": "their references, in torch"}
"""What the variable may be -> what computes then."""


def chosen(environ: Mapping[str, str] = os.environ) -> str | None:
    """The back end; None leaves the experts on the GPU to SGLang.

    Raises:
        ValueError: there is no such back end.
    """
    return backend_named(environ.get(VARIABLE) or None, f"{VARIABLE}=")


def description(backend: str | None) -> str:
    """Who computes, in words."""
    if backend is None:
        return f"SGLang ({VARIABLE} is not set)"
    return f"{VARIABLE}={backend}: {BACKENDS[backend]}"


def backend_named(name: str | None, option: str) -> str | None:
    """`name`, checked; `option` is how the message says where it comes from."""
    if name is not None and name not in BACKENDS:
        choices = ", ".join(f"{choice} ({what})" for choice, what in BACKENDS.items())
        raise ValueError(
            f"{option}{name}: choose {choices}, or leave it out: then SGLang computes the experts "
            "on the GPU"
        )
    return name
