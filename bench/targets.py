"""What a layer should reach, as shares of this machine's ceilings and ratios to other libraries.

Stated for two threads; a share holds on any processor, and so does a ratio where both libraries
have their best kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OUR_ERROR = 0.0030
"""MXFP4, ||y - reference|| / ||reference||, for plain inputs and for inputs with outliers."""

FORK_JOIN_US = {"hot": 3.0, "asleep": 60.0}
"""An empty job with two threads, median."""


@dataclass(frozen=True)
class Target:
    """Least shares (0 to 1) and ratios at one point.

    Attributes:
        read: of the read bandwidth of the same seconds.
        peak: of the peak multiply-accumulates of the tier.
        faster: library -> its time over ours.
    """

    method: str
    shape: str
    tokens: int
    read: float | None = None
    peak: float | None = None
    faster: Mapping[str, float] = field(default_factory=dict)

    def verdicts(
        self, read: float, peak: float, faster: Mapping[str, float]
    ) -> list[tuple[str, bool]]:
        """Each part as ("wanted: measured", met); parts whose library did not run are left out."""
        parts = []
        for name, least, found in (("read", self.read, read), ("peak", self.peak, peak)):
            if least is not None:
                parts.append((f"{name} {100 * found:.0f} % of {100 * least:.0f} %", found >= least))
        for library, least in self.faster.items():
            if library in faster:
                found = faster[library]
                parts.append((f"{library} {found:.2f} x of {least:.2f} x", found >= least))
        return parts


TARGETS = (
    Target("MXFP4", "A", 1, read=0.85, faster={"ggml": 1.6}),
    Target("MXFP4", "A", 4, faster={"ggml": 1.79}),
    Target("MXFP4", "A", 16, faster={"ggml": 2.81}),
    Target("MXFP4", "A", 64, peak=0.64),
    Target("MXFP4", "A", 1024, peak=0.81),
    Target("BF16", "A", 1, read=0.92),
    Target("BF16", "A", 1024, peak=0.88),
    *(Target("MXFP4", shape, 1, read=0.82) for shape in "BCD"),
    *(Target("MXFP4", shape, 1024, peak=0.75) for shape in "BCD"),
)
"""Peaks are 150, 190, 205 and 175 of 234 * 10^9 multiply-accumulates a second, the peak of two
Zen 4 cores at 3.66 GHz."""


def target_for(method: str, shape: str, tokens: int) -> Target | None:
    """The target of a point, or None."""
    wanted = (method, shape, tokens)
    return next((t for t in TARGETS if (t.method, t.shape, t.tokens) == wanted), None)
