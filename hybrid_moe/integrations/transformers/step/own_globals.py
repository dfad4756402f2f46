"""A module's `forward` with other values for some of the names that it looks up.

Model code calls functions of its file by their names: `apply_rotary_pos_emb(...)`, `F.linear(...)`.
Where one of them shall be another for one module, its `forward` becomes the same code with globals
of its own. Nothing of the model is copied, and other modules and models stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch


def looks_up(module: torch.nn.Module, name: str) -> Any:
    """The value of a global that `module.forward` looks up, or None if it does not. A `forward`
    that is no plain function of the class, or has been replaced already, looks up nothing."""
    forward = module.__dict__.get("forward", type(module).forward)
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, FunctionType) or (
        "forward" in module.__dict__ and not hasattr(function, "_hybrid_moe_globals")
    ):
        return None
    return function.__globals__.get(name) if name in function.__code__.co_names else None


def set_globals(module: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Let `module.forward` find `values` under their names, which it `looks_up`.

    Other names keep the values that they have now. A graph that torch captures is one of the
    class's own `forward`: TorchDynamo looks globals up in the module that the code is of.
    """
    forward = module.__dict__.get("forward", type(module).forward)
    function: FunctionType = getattr(forward, "__func__", forward)
    made = FunctionType(
        function.__code__,
        {**function.__globals__, **values},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    made._hybrid_moe_globals = tuple(values)  # type: ignore[attr-defined]
    module.__dict__["forward"] = MethodType(made, module)  # a copy gets one of its own
