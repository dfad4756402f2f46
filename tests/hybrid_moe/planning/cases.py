"""A machine that exists nowhere, with round figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrid_moe.formats.table import FORMATS
from hybrid_moe.planning import CpuSpeeds, Plan, Request, parse_gpus
from hybrid_moe.planning.plan import CPU_EXPERTS

GIB = 1 << 30
CPU = CpuSpeeds(80e9, dict.fromkeys(FORMATS, 1000e9), "as given")


def request(*gpus: str, **changes: Any) -> Request:
    """A request for a machine with 16 threads and much memory."""
    default = Request(
        gpus=parse_gpus(gpus), ram=1 << 40, context=8192, requests=4, chunk=2048, threads=16,
        pools=1, cpu=CPU,
    )  # fmt: skip
    return replace(default, **changes)


def expert_ram(plan: Plan) -> int:
    """Resident bytes of the experts on the CPU: panels, biases, and rounding to pages."""
    return sum(part.nbytes for part in plan.parts if part.name.startswith(CPU_EXPERTS))
