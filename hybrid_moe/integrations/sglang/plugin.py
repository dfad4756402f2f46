"""Whether to take over from kt-kernel in this SGLang, and doing it.

SGLang looks for `kt_kernel.KTMoEWrapper` at import, long before plugins run, and keeps what it
found in module globals. So the globals are set, and `FusedMoE` gets our `KTEPWrapperMethod`.

Every process of every server loads the plugin, with `--kt-*` or without. So `register` imports
nothing of SGLang and hooks into nothing: it leaves a stand-in where `FusedMoE` looks for the
method, and making the first method checks the contract and does the rest.

Only `FusedMoE` gets it. Model files keep SGLang's class, for they use it in one way: where a
layer's method is an instance of it, some of them (in some of their paths) multiply the layer's
output by `routed_scaling_factor`. Our method obeys the contract of every other method instead
(the output carries the factor already), so for models it must not be one of those.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_moe.integrations.sglang import contract
from hybrid_moe.integrations.sglang.late import when_imported

logger = logging.getLogger(__name__)

SWITCH = "HYBRID_MOE_SGLANG"
"""Environment variable: 1 takes over even where kt-kernel is installed, 0 never does."""

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

    A changed contract is raised where the options lead: by building a layer with them.

    Raises:
        ValueError: the environment variable's value.
    """
    decision = decide(os.environ, installed_kt_kernel())
    if decision.take_over:
        when_imported(contract.LAYER_MODULE, lambda layer: _stand_in(layer, decision))
    else:
        line = f"hybrid_moe leaves --kt-* to others: {decision.reason}"
        when_imported(contract.KT_MODULE, lambda module: _announce(module, line))


def _stand_in(layer_module: Any, decision: Decision) -> None:
    """Put a class where `FusedMoE` looks for the method: making its first object takes over."""
    if not hasattr(layer_module, "KTEPWrapperMethod"):
        logger.debug("%s has no --kt-* method: nothing can reach ours", layer_module.__name__)
        return

    class KTEPWrapperMethod:
        """Never the class of any object."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return take_over(decision)(*args, **kwargs)

    layer_module.KTEPWrapperMethod = KTEPWrapperMethod


def take_over(decision: Decision) -> type:
    """Check the contract, set SGLang's globals, and hook into its scheduler.

    Returns:
        Our method.

    Raises:
        ContractError: SGLang lacks something that we rely on; the message lists it.
    """
    version = contract.installed_version()
    untested = contract.untested(version)
    if untested is not None:
        logger.warning("%s", untested)
    contract.check()
    logger.info("hybrid_moe serves --kt-* of SGLang %s: %s", version, decision.reason)
    return _install()


def _install() -> type:
    from hybrid_moe.integrations.sglang import server_metrics, server_profile, step_faults
    from hybrid_moe.integrations.sglang.method import KTEPWrapperMethod
    from hybrid_moe.wrapper import KTMoEWrapper

    step_faults.install()
    server_metrics.start()
    if (profile := server_profile.chosen()) is not None:
        server_profile.install(profile)
    for name in (contract.KT_MODULE, contract.GRAPH_MODULE):
        module = importlib.import_module(name)
        _set(module, KTMoEWrapper=KTMoEWrapper, KTRANSFORMERS_AVAILABLE=True)
    _set(importlib.import_module(contract.LAYER_MODULE), KTEPWrapperMethod=KTEPWrapperMethod)
    return KTEPWrapperMethod


def _announce(kt_module: Any, line: str) -> None:
    """Log a line when the first layer with `--kt-*` is made: SGLang sets up logging only after
    plugins have run, and who does not use these options need not hear of them."""
    method = getattr(kt_module, "KTEPWrapperMethod", None)
    if method is None:
        return
    original = method.__init__

    @functools.wraps(original)
    def tell(self: Any, *args: Any, **kwargs: Any) -> None:
        method.__init__ = original
        logger.info("%s", line)
        original(self, *args, **kwargs)

    method.__init__ = tell


def _set(module: Any, **names: object) -> None:
    for name, value in names.items():
        setattr(module, name, value)
