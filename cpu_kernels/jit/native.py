"""Drivers: Python functions that Numba turns into IR and our own cache keeps.

A driver is a plain loop over addresses and integers. Numba translates it (`nogil`, no reference
counts, no exceptions) and hands its IR to `jit.compile`; the cache key is the source of every
driver module, so a cached start imports neither Numba's compiler nor LLVM's optimizer. Numba's
own disk cache is not used: it does not notice a change in another file's intrinsic.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

from hybrid_moe.cpu_kernels.jit.compile import Target, emit_object, load_object

logger = logging.getLogger(__name__)


def _source_digest(modules: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"driver module {name} has no source file")
        digest.update(name.encode() + b"\0" + Path(spec.origin).read_bytes() + b"\0")
    return digest.hexdigest()


def compile_drivers(modules: Sequence[str], entries: Mapping[str, str]) -> Mapping[str, int]:
    """Addresses of compiled drivers.

    Args:
        modules: every module whose source shapes the code (drivers and their intrinsics).
        entries: exported name -> "module:function". Each function takes and returns int64 only.
    """
    target = Target(cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten())
    key = "|".join(
        [
            platform.python_version(),
            metadata.version("numba"),
            _source_digest(modules),
            repr(sorted(entries.items())),
        ]
    )
    payload = emit_object(lambda: _drivers_ir(entries), target, "drivers", key)
    return load_object(payload, list(entries))


def _drivers_ir(entries: Mapping[str, str]) -> str:
    """One IR module: Numba's code of every entry plus an exported `i64 f(i64, ...)` for each."""
    from numba import types  # slow to import, needed on a cold cache only

    modules = []
    for exported, path in entries.items():
        module_name, _, function_name = path.partition(":")
        driver = getattr(importlib.import_module(module_name), function_name)
        arity = len(inspect.signature(driver.py_func).parameters)
        compiled = driver.overloads[(types.int64,) * arity]
        modules.append(
            (compiled.library.get_llvm_str(), exported, compiled.fndesc.llvm_func_name, arity)
        )
    linked: llvm.ModuleRef | None = None
    for text, exported, native, arity in modules:
        module = llvm.parse_assembly(text + _trampoline(exported, native, arity))
        if linked is None:
            linked = module
        else:
            linked.link_in(module)
    return str(linked)


def _trampoline(exported: str, native: str, arity: int) -> str:
    """Numba's convention is i32 f(i64* result, i8** exception, ...); ours is i64 f(...)."""
    parameters = ", ".join(f"i64 %a{i}" for i in range(arity))
    arguments = "".join(f", i64 %a{i}" for i in range(arity))
    return f"""
define i64 @{exported}({parameters}) {{
  %result = alloca i64
  %exception = alloca ptr
  store i64 0, ptr %result
  %status = call i32 @{native}(ptr %result, ptr %exception{arguments})
  %value = load i64, ptr %result
  ret i64 %value
}}
"""
