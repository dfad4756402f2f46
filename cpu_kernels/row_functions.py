"""Small kernels on rows of a tensor that the calling thread runs itself, by addresses.

They stand for several operations of torch each, in whose place a decode step calls them: no job, no
other thread, and the interpreter's lock is kept, since giving it up takes as long as they do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping

from hybrid_moe.cpu_kernels.drivers import check_machine
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, choose_tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.jit.sources import source_key
from hybrid_moe.cpu_kernels.kernels.rms_norm import STYLES, rms_norm

RowFunction = Callable[..., None]
"""Takes addresses and integers, as its kernel says."""


@functools.lru_cache(maxsize=16)
def rms_norms(tier: Tier | None = None) -> Mapping[str, RowFunction]:
    """Compiled `rms_norm.rms_norm` by the name of its style, for `tier` or the best one.

    Raises:
        NotImplementedError: neither x86-64 nor aarch64.
    """
    check_machine()
    tier = tier or choose_tier()
    names = {name: f"rms_norm{i}" for i, name in enumerate(STYLES)}
    functions = [(names[name], 6, rms_norm(style)) for name, style in STYLES.items()]
    label = f"rms_norms_{tier.name}"
    own = tier is TIERS.get(tier.name)  # else a name does not tell what it is
    at = compile_functions(
        lambda: build_module(functions, tier, label),
        tier.target,
        list(names.values()),
        label,
        sources=source_key(label) if own else None,
    )
    kind = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 6)
    return {name: kind(at[symbol]) for name, symbol in names.items()}
