"""Test shim: a module to import where SGLang's kernels for the CPU would be.

They are not on PyPI. Without AMX, SGLang imports the names and computes with torch; a call is an
error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is a test shim: it can only be imported")

    return absent
