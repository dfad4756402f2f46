"""Which of the experts that were sent for a step stay on the GPU.

Their copy is paid for. What staying costs is a place: that of a resident expert, which goes back to
the CPU, where its weights still are. So an expert stays where it is used more than the least used
resident one, by `MARGIN`: uses that are nearly equal would take turns. `placement.online` moves
experts that nothing has sent, which costs a copy; by the same measure of use both agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MARGIN = 1.25
"""A measured use wanders: a mean that decays by d has a standard deviation of sqrt(p (1 - p) d / 2)
around p (a geometric sum of d^2 (1 - d)^(2n), which is d / 2). For p = 0.1 and d = 0.01 that is
0.021, a fifth of it: a quarter more is not often chance."""


def staying(
    sent: Sequence[int], use: npt.ArrayLike, resident: npt.ArrayLike
) -> tuple[tuple[int, int], ...]:
    """(Expert that stays, expert whose place it takes), the most used first.

    Args:
        sent: ids of a layer's experts that were copied for this step.
        use: float [E], the share of tokens that take each, a mean that decays.
        resident: bool [E], experts that have a place.

    Raises:
        ValueError: an expert was sent although it is resident, or shapes differ.
    """
    uses, placed = np.asarray(use, np.float64), np.asarray(resident, bool)
    if uses.ndim != 1 or uses.shape != placed.shape:
        raise ValueError(
            f"use has shape {list(uses.shape)} and resident {list(placed.shape)}: both must be "
            "[experts]"
        )
    both = [expert for expert in sent if placed[expert]]
    if both:
        raise ValueError(f"expert {both[0]} was sent although it is resident")
    coming = sorted(sent, key=lambda expert: (-uses[expert], expert))
    going = sorted(np.flatnonzero(placed).tolist(), key=lambda expert: (uses[expert], -expert))
    pairs = zip(coming, going, strict=False)
    return tuple((new, old) for new, old in pairs if uses[new] > MARGIN * uses[old])
