"""The door out of a graph that is being captured. Imported while one is: it loads TorchDynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Break the graph and call `function` as it is.

    TorchDynamo follows any Python code, and replaces NumPy arrays on its way by arrays of its own
    that do not live as long. Code that hands addresses of arrays to compiled code must not be
    followed: it would read and write freed memory.
    """
    return function(*arguments, **named)
