"""The gated activation between the two projections."""

from __future__ import annotations

import math
from dataclasses import dataclass


def activation_bits(cpu_activation: str | None) -> int:
    """Bits of the inputs of products on processors, see `cpu_activation` of `KTMoEWrapper`.

    Raises:
        ValueError: neither None nor "int8".
    """
    if cpu_activation not in (None, "int8"):
        raise ValueError(f"cpu_activation is {cpu_activation!r}, must be None or 'int8'")
    return 16 if cpu_activation is None else 8


@dataclass(frozen=True)
class Activation:
    """SwiGLU and its clamped variants.

    alpha 0 is silu(gate) * up; alpha > 0 is gpt-oss's gate * sigmoid(alpha * gate) * (up + 1).
    limit > 0 first clamps gate from above and up from both sides.

    Raises:
        ValueError: a parameter is negative or not finite.
    """

    limit: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("limit", "alpha"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"swiglu_{name} must be finite and at least 0, not {value}")

    @property
    def parameters(self) -> tuple[float, float, float]:
        """What the kernel reads: limit, alpha, what is added to up."""
        limit = self.limit if self.limit > 0 else math.inf
        return (limit, self.alpha, 1.0) if self.alpha > 0 else (limit, 1.0, 0.0)
