"""A module's `forward` with other values for some of the names that it looks up.

Model code calls functions of its file by their names: `apply_rotary_pos_emb(...)`, `F.linear(...)`.
Where one of them shall be another for one module, its `forward` becomes the same code with globals
of its own. Nothing of the model is copied, and other modules and models stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch


def looks_up(module: torch.nn.Module, name: str) -> Any:
    """The value of a global that `module.forward` looks up, or None if it does not. One that has
    been replaced already, or is no plain function of the class, looks up nothing."""
    forward = type(module).forward
    if "forward" in module.__dict__ or not isinstance(forward, FunctionType):
        return None
    return forward.__globals__.get(name) if name in forward.__code__.co_names else None


def set_globals(module: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Let `module.forward` find `values` under their names, which it `looks_up`. Other names keep
    the values that they have now. In graphs that torch captures the class's own `forward` runs."""
    forward = _with_globals(type(module).forward, tuple(values.items()))
    module.__dict__["forward"] = MethodType(forward, module)  # a copy gets one of its own


@functools.cache
def _with_globals(own: FunctionType, values: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`own` for eager code, see `set_globals`."""
    made = FunctionType(
        own.__code__,
        {**own.__globals__, **dict(values)},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    made.__kwdefaults__ = own.__kwdefaults__

    @functools.wraps(own)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # TorchDynamo looks globals up where the code is from
            return own(self, *args, **kwargs)
        return made(self, *args, **kwargs)

    return forward
