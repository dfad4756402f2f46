"""Whether to take over from kt-kernel in this SGLang, and doing it.

SGLang looks for `kt_kernel.KTMoEWrapper` at import, long before plugins run, and keeps what it
found in module globals. So the globals are set, and `FusedMoE` gets our `KTEPWrapperMethod`.

Only `FusedMoE` gets it. Model files keep SGLang's class, for they use it in one way: where a
layer's method is an instance of it, some of them (in some of their paths) multiply the layer's
output by `routed_scaling_factor`. Our method obeys the contract of every other method instead
(the output carries the factor already), so for models it must not be one of those.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hybrid_moe.integrations.sglang import contract

logger = logging.getLogger(__name__)

SWITCH = "HYBRID_MOE_SGLANG"
"""Environment variable: 1 takes over even where kt-kernel is installed, 0 never does."""

UPSTREAM_METHOD = f"{contract.KT_MODULE}.KTEPWrapperMethod"
OUR_METHOD = "hybrid_moe.integrations.sglang.method.KTEPWrapperMethod"

COMPAT_DISTRIBUTION = "hybrid-moe-kt-compat"
"""Our own distribution of the import name `kt_kernel`: no reason to stand back."""


@dataclass(frozen=True)
class Decision:
    """Whether the `--kt-*` options are ours, and why."""

    take_over: bool
    reason: str


def decide(environ: Mapping[str, str], kt_kernel: str | None) -> Decision:
    """Take over unless somebody else's kt-kernel is installed; `SWITCH` overrules.

    Args:
        environ: the process's environment.
        kt_kernel: what provides the module `kt_kernel`, None if there is none.

    Raises:
        ValueError: the switch is neither 0 nor 1.
    """
    switch = environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}={switch!r} must be 1 (take over) or 0 (do not)")
    if switch:
        return Decision(switch == "1", f"{SWITCH}={switch}")
    if kt_kernel is None:
        return Decision(True, "kt_kernel is not installed")
    if kt_kernel == COMPAT_DISTRIBUTION:
        return Decision(True, f"kt_kernel is {COMPAT_DISTRIBUTION}")
    return Decision(False, f"{kt_kernel} is installed ({SWITCH}=1 takes over)")


def installed_kt_kernel() -> str | None:
    """The distribution that provides the module `kt_kernel`; None if nothing does."""
    if importlib.util.find_spec("kt_kernel") is None:
        return None
    providers = importlib.metadata.packages_distributions().get("kt_kernel", ["kt_kernel"])
    return COMPAT_DISTRIBUTION if COMPAT_DISTRIBUTION in providers else providers[0]


def register() -> None:
    """Take over the `--kt-*` options of this process's SGLang, if it is ours to do.

    SGLang logs what a plugin raises and goes on without it. So a changed contract is also put
    where the options lead: building a layer with them raises it.

    Raises:
        ContractError: SGLang lacks something that we rely on; the message lists it.
        ValueError: the environment variable's value.
    """
    decision = decide(os.environ, installed_kt_kernel())
    if not decision.take_over:
        _announce(UPSTREAM_METHOD, f"hybrid_moe leaves --kt-* to others: {decision.reason}")
        return
    version = contract.installed_version()
    untested = contract.untested(version)
    if untested is not None:
        logger.warning("%s", untested)
    try:
        contract.check()
    except contract.ContractError as error:
        _refuse(error)
        raise
    _install()
    _announce(OUR_METHOD, f"hybrid_moe serves --kt-* of SGLang {version}: {decision.reason}")


def _announce(method: str, line: str) -> None:
    """Log a line when the first layer with `--kt-*` is made: SGLang sets up logging only after
    plugins have run, and who does not use these options need not hear of them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    told = False

    def tell(*args: object, **kwargs: object) -> None:
        nonlocal told
        if not told:
            told = True
            logger.info("%s", line)

    HookRegistry.register(f"{method}.__init__", tell, HookType.BEFORE)


def _install() -> None:
    """Set SGLang's globals, and hook into its scheduler."""
    from hybrid_moe.integrations.sglang import step_faults
    from hybrid_moe.integrations.sglang.method import KTEPWrapperMethod
    from hybrid_moe.wrapper import KTMoEWrapper

    step_faults.install()
    for name in (contract.KT_MODULE, contract.GRAPH_MODULE):
        module = importlib.import_module(name)
        _set(module, KTMoEWrapper=KTMoEWrapper, KTRANSFORMERS_AVAILABLE=True)
    _set(importlib.import_module(contract.LAYER_MODULE), KTEPWrapperMethod=KTEPWrapperMethod)


def _refuse(error: Exception) -> None:
    """Let the `--kt-*` options fail with `error`, where SGLang still has the place for it."""

    class KTEPWrapperMethod:
        def __init__(self, *args: object, **kwargs: object) -> NoReturn:
            raise error

    try:
        _set(importlib.import_module(contract.LAYER_MODULE), KTEPWrapperMethod=KTEPWrapperMethod)
    except ImportError:
        logger.debug("%s is gone: nothing can reach a --kt-* layer", contract.LAYER_MODULE)


def _set(module: Any, **names: object) -> None:
    for name, value in names.items():
        setattr(module, name, value)
