"""Registers the experts function in Transformers without importing Transformers.

`import hybrid_moe` must stay cheap, yet after it
`AutoModelForCausalLM.from_pretrained(dir, experts_implementation="hybrid_moe")` must find the
name. So `install()` registers at once in the interfaces whose modules are loaded already, and asks
Python's import system to be told when one of the others is. The registered function is a
trampoline: the implementation is imported at its first call. With the name comes its guard, into
the module that has Transformers' models.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hybrid_moe.integrations.guard import NAME, guard

_log = logging.getLogger(__name__)

INTERFACES = {
    "transformers.integrations.moe": "ExpertsInterface",
    "transformers.integrations.finegrained_fp8": "FP8ExpertsInterface",
}
"""Module -> its class with `register(name, function)`; the second is for FP8 and FP4 experts."""

MODELS = "transformers.modeling_utils"
"""The module whose `PreTrainedModel` is guarded, see `guard`."""

MODULES = (*INTERFACES, MODELS)


def experts_function(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What Transformers calls: (experts module, hidden [S, H], ids [S, k], weights [S, k])."""
    from hybrid_moe.integrations.dispatch import experts_forward

    return experts_forward(module, *args, **kwargs)


def install() -> None:
    """Register now where the interface's module is loaded, and otherwise when it is imported.

    Idempotent; imports nothing.
    """
    for module_name in MODULES:
        if module_name in sys.modules:
            register_in(sys.modules[module_name])
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def register_in(module: ModuleType) -> bool:
    """Register in the interface of the loaded `module`, or guard its models; False if it has none
    (an old version)."""
    if module.__name__ == MODELS:
        return guard(module)
    interface = getattr(module, INTERFACES[module.__name__], None)
    if interface is None:
        _log.warning(
            '%s has no %s: experts_implementation="%s" needs transformers >= 5.17',
            module.__name__, INTERFACES[module.__name__], NAME,
        )  # fmt: skip
        return False
    interface.register(NAME, experts_function)
    return True


class _RegisterOnImport:
    """A meta path finder that finds nothing itself: it lets the others find the interfaces'
    modules and appends the registration to their execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES:
            return None
        spec = _find_without(self, name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # the loader is as it was again
            execute(module)
            register_in(module)

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _find_without(
    skipped: _RegisterOnImport, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """What the import system would find for `name` if `skipped` were not there."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if finder is skipped or find_spec is None:
            continue
        spec: importlib.machinery.ModuleSpec | None = find_spec(name, path, target)
        if spec is not None:
            return spec
    return None
