"""`hybrid-moe doctor --sglang`: would the plugin take over here, and does the contract hold?"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_moe.integrations.sglang import contract, gpu_backend
from hybrid_moe.integrations.sglang.plugin import decide, installed_kt_kernel


@dataclass(frozen=True)
class SglangReport:
    """The state of the plugin on this machine.

    Attributes:
        version: SGLang's; None if it has no metadata.
        tested: versions that the plugin was tested with.
        warning: what the plugin would warn of about the version, None for nothing.
        take_over: whether the `--kt-*` options are ours; `reason` says why.
        gpu_backend: who computes the experts on the GPU then; None for SGLang.
        problems: what we rely on in SGLang -> what is wrong with it, None where it holds.
    """

    version: str | None
    tested: str
    warning: str | None
    take_over: bool
    reason: str
    gpu_backend: str | None
    problems: dict[str, str | None]

    @property
    def broken(self) -> bool:
        """Whether the plugin would refuse to work."""
        return any(problem is not None for problem in self.problems.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def plugin_report() -> SglangReport:
    """Gather the report. Imports SGLang, which takes seconds.

    Raises:
        ModuleNotFoundError: SGLang is not installed.
        ValueError: an environment variable's value.
    """
    if not contract.is_installed():
        raise ModuleNotFoundError("SGLang is not installed in this environment", name="sglang")
    decision = decide(os.environ, installed_kt_kernel())
    version = contract.installed_version()
    return SglangReport(
        version=version,
        tested=contract.tested_range(),
        warning=contract.untested(version),
        take_over=decision.take_over,
        reason=decision.reason,
        gpu_backend=gpu_backend.chosen(),
        problems={f.requirement.target: f.problem for f in contract.examine()},
    )
