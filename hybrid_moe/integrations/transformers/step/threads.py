"""torch's threads beside the pool's: one in decode steps, all of them in long prompts.

A decode step leaves torch microseconds of work at a time, and its OpenMP threads spin for
milliseconds after each, on the cores that the pool's workers want. A long prompt leaves it real
work. So the threads of torch follow the tokens of each forward pass, and are one between the passes
of `generate`, where the next token is chosen.

The pool's workers, in turn, stay awake through the gaps of a decode step (`PoolGroup.awake`): a
gap is longer than they spin else, and to wake one takes the caller 25 us and the job as long again.

Only the calling thread's setting changes: OpenMP keeps one for each thread, `torch.get_num_threads`
is that, and MKL has one that goes before it. `torch.set_num_threads` would also set what threads
get that start later, those of other models among them. Whatever ends a scope restores both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.logs import warn_once

FEW_TOKENS = 64
"""Tokens of a pass below which torch gets one thread. Elementwise operations use more from 32768
elements on (`at::internal::GRAIN_SIZE`), a dozen tokens, but take less time than a barrier until
there are some times as many."""

_SCOPED = ("forward", "generate")
_POOL = "_hybrid_moe_pool"
"""Attribute of a model: the pool of its layers."""


class _Caller(threading.local):
    """The settings that a thread has outside of all scopes; None: it is in none."""

    own: tuple[int, int] | None = None


_caller = _Caller()


@functools.lru_cache(maxsize=1)
def _setters() -> tuple[Callable[[int], Any], Callable[[int], int]]:
    """Set the calling thread's threads of OpenMP, and of MKL (which returns what they were; 0 means
    as many as OpenMP's). Both are those that torch is linked with."""
    library = ctypes.CDLL(torch._C.__file__)  # is loaded; its dependencies are searched as well
    mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
    openmp = getattr(library, "omp_set_num_threads", None)
    now = torch.get_num_threads()
    if openmp is not None:
        openmp(now + 1)
        found = torch.get_num_threads() == now + 1
        openmp(now)
        if found:
            return openmp, mkl or (lambda count: 0)
    warn_once(
        "this build of torch does not take its number of threads from OpenMP: models of hybrid_moe "
        "set it for the whole process while they decode"
    )
    return torch.set_num_threads, lambda count: 0


@contextlib.contextmanager
def torch_threads(few: bool) -> Iterator[None]:
    """Give torch one thread on the calling thread (`few`), or as many as it had outside of all of
    these scopes. Scopes nest; each restores what it found."""
    set_openmp, set_mkl = _setters()
    outer = _caller.own
    before, mkl = torch.get_num_threads(), set_mkl(1)
    try:
        _caller.own = outer or (before, mkl)
        openmp_threads, mkl_threads = (1, 1) if few else _caller.own
        set_openmp(openmp_threads)
        set_mkl(mkl_threads)
        yield
    finally:
        _caller.own = outer
        set_openmp(before)
        set_mkl(mkl)


def scope_threads(model: torch.nn.Module, pool: PoolConfig | None = None) -> None:
    """Let `model.forward` and `model.generate` run in scopes of `torch_threads`, and the workers of
    `pool` stay awake in decode steps. Idempotent."""
    model.__dict__[_POOL] = pool
    for name in _SCOPED:
        own = getattr(type(model), name, None)
        if own is not None and name not in model.__dict__:
            # a bound method: a copy of the model gets one of its own
            model.__dict__[name] = MethodType(_scoped(own, name), model)


@functools.cache
def _scoped(own: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A class's method, in a scope; its signature stays."""

    @functools.wraps(own)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        pool: PoolConfig | None = self.__dict__.get(_POOL)
        few = _tokens(args, kwargs) < FEW_TOKENS
        awake = group_for(pool).awake() if few and pool else contextlib.nullcontext()
        with torch_threads(few), awake:
            return own(self, *args, **kwargs)

    @functools.wraps(own)
    def generate(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch_threads(few=True):
            return own(self, *args, **kwargs)

    return forward if name == "forward" else generate


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a forward pass; many if nothing tells."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    embedded = kwargs.get("inputs_embeds")
    if isinstance(embedded, torch.Tensor):
        return embedded.shape[:-1].numel()
    return FEW_TOKENS
