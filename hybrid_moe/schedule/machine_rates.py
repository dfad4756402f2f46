"""How fast a machine reads, multiplies, copies and hands over: what its kernels reach, not its
ceilings. Whoever makes them multiplies a ceiling, measured or given, by the share that is reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class MachineRates:
    """Rates in units per second, fixed costs in seconds.

    Attributes:
        cpu_read: bytes of experts that the CPU streams; all its threads and sockets.
        gpu_read: bytes that the GPUs read of their memory, of weights and cache.
        gpu_flops: floating point operations of the GPUs with many tokens.
        link: bytes that a copy moves from the CPU's memory to the GPU; 0 where nothing can be sent.
        memory: bytes that the CPU's memory gives to the CPU and the link together: copies take
            bandwidth from the CPU's experts. Infinite: they do not meet.
        submit: from the GPU's hand-over of a batch until the CPU's workers have started.
        back: from the last worker's end until the GPU goes on with the sum.
        transfer: of each layer's copies, until the first byte moves.
        launch: of the GPU for each layer, beside what it reads and computes.

    Raises:
        ValueError: a rate that is not positive, or a cost that is negative or not finite.
    """

    cpu_read: float
    gpu_read: float
    gpu_flops: float
    link: float = 0.0
    memory: float = math.inf
    submit: float = 0.0
    back: float = 0.0
    transfer: float = 0.0
    launch: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            rate = field.name in ("cpu_read", "gpu_read", "gpu_flops", "memory")
            if math.isnan(value) or (value <= 0 if rate else not 0 <= value < math.inf):
                must = "above 0" if rate else "0 or more, and finite"
                raise ValueError(f"{field.name} is {value}, must be {must}")
