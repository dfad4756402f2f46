"""Kernel bodies and drivers as machine code, to be called on NumPy arrays and integers."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE, Tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.jit.driver import Driver
from hybrid_moe.cpu_kernels.jit.translate import translate

Array = npt.NDArray[Any]


def callable_at(address: int, arity: int) -> Callable[..., None]:
    """A compiled kernel as a function of addresses (arrays are taken by theirs) and integers."""
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arity)(address)

    def call(*arguments: Any) -> None:
        function(*[a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments])

    return call


def compile_kernel(body: KernelBody, arity: int, tier: Tier) -> Callable[..., None]:
    """Compile one kernel whose parameters are `arity` integers."""
    text = build_module([("kernel", arity, body)], tier, "test")
    return callable_at(compile_functions(text, tier.target, ["kernel"], "test")["kernel"], arity)


def aligned(shape: Any, dtype: Any, fill: int = 0) -> Array:
    """An array on a 64-byte boundary, every byte `fill`."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(nbytes + 64, fill, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def aligned_copy(array: Array) -> Array:
    out = aligned(array.shape, array.dtype)
    out[...] = array
    return out


def before_a_guard(nbytes: int, fill: int = 0) -> Array:
    """Bytes, every one `fill`, that end where a page begins which must not be touched."""
    page = mmap.PAGESIZE
    size = -(-nbytes // page) * page
    mapping = mmap.mmap(-1, size + page)
    raw = np.frombuffer(mapping, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(raw.ctypes.data + size), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    out = raw[size - nbytes : size]
    out[:] = fill
    return out


def run_script(
    code: str, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter that can import the tests; it must not hang."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def compiled(*functions: Driver[..., Any]) -> list[Callable[..., int]]:
    """The drivers as machine code."""
    names = [function.__name__ for function in functions]
    text = translate(dict(zip(names, functions, strict=True)))
    at = compile_functions(text, PORTABLE.target, names, "test", program=True)
    kinds = [ctypes.CFUNCTYPE(*[ctypes.c_int64] * (1 + len(d.parameters))) for d in functions]
    return [kind(at[name]) for kind, name in zip(kinds, names, strict=True)]
