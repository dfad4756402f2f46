"""Registers the experts function in Transformers without importing Transformers.

`import hybrid_moe` must stay cheap, yet after it
`AutoModelForCausalLM.from_pretrained(dir, experts_implementation="hybrid_moe")` must find the
name. So `install()` registers at once in the interfaces whose modules are loaded already, and in
the others when they are, see `late`. The registered function is a trampoline: the implementation is
imported at its first call. With the name comes its guard, into the module that has Transformers'
models.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from hybrid_moe.integrations.late import when_imported
from hybrid_moe.integrations.transformers.guard import NAME, guard

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
    from hybrid_moe.integrations.transformers.dispatch import experts_forward

    return experts_forward(module, *args, **kwargs)


def install() -> None:
    """Register now where the interface's module is loaded, and otherwise when it is imported.

    Idempotent; imports nothing.
    """
    when_imported(MODULES, register_in)


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
