"""Small kernels on rows of a tensor that the calling thread runs itself, by addresses.

They stand for several operations of torch each, in whose place a decode step calls them: no job, no
other thread, and the interpreter's lock is kept, since giving it up takes as long as they do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping

from hybrid_moe.cpu_kernels.drivers import check_machine
from hybrid_moe.cpu_kernels.dsl.emit import KernelBody
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.kernels.library import compile_kernels
from hybrid_moe.cpu_kernels.kernels.rms_norm import STYLES, rms_norm
from hybrid_moe.cpu_kernels.kernels.rotate import rotate
from hybrid_moe.cpu_kernels.kernels.router_logits import router_logits

RowFunction = Callable[..., None]
"""Takes addresses and integers, as its kernel says."""

ROTATE = "rotate"
LOGITS = {False: "router_logits", True: "router_logits_biased"}
"""By whether there is a bias."""

_KERNELS: dict[str, tuple[int, KernelBody]] = {
    **{name: (6, rms_norm(style)) for name, style in STYLES.items()},
    ROTATE: (7, rotate),
    **{name: (7, router_logits(biased)) for biased, name in LOGITS.items()},
}
"""Parameters and body by name; norms have that of their style."""


@functools.lru_cache(maxsize=16)
def row_functions(tier: Tier | None = None) -> Mapping[str, RowFunction]:
    """All of them by name, compiled for `tier` or the best one.

    Raises:
        NotImplementedError: neither x86-64 nor aarch64.
    """
    check_machine()
    tier = tier or choose_tier()
    symbols = {name: f"row_function{i}" for i, name in enumerate(_KERNELS)}
    functions = [(symbols[name], *kernel) for name, kernel in _KERNELS.items()]
    at = compile_kernels(functions, tier, f"row_functions_{tier.name}")
    void = ctypes.c_void_p  # takes any address or count
    return {
        name: ctypes.PYFUNCTYPE(None, *[void] * arity)(at[symbols[name]])
        for name, (arity, _) in _KERNELS.items()
    }
