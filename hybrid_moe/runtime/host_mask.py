"""Which experts are computed elsewhere, as a call on CPU tensors finds it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.placement_change import HOT


class HostMask:
    """The live mask of a layer, as calls on CPU tensors see it.

    Args:
        mask: bool or uint8 [E] CPU tensor, live: not 0 for experts to skip.
        resident: bool [E]: experts that are loaded.

    Attributes:
        address: of what `look` has found, uint8 [E]: routing reads it once for each pair, and must
            not see two masks.
        epoch: how often it had changed when `look` was called last.
        nowhere: an expert that was neither loaded nor skipped then, or -1.
    """

    def __init__(self, mask: torch.Tensor, resident: npt.NDArray[np.bool_]) -> None:
        self._live: npt.NDArray[np.uint8] = mask.numpy().view(np.uint8)  # shares its memory
        self._resident = resident
        self._found = np.zeros(len(self._live), np.uint8)
        self.address = int(self._found.ctypes.data)
        self.epoch = 0
        self._take(self._live.tobytes())

    def look(self) -> None:
        """See whether it has changed; it seldom does."""
        now = self._live.tobytes()
        if now != self._seen:
            self.epoch += 1
            self._take(now)

    def _take(self, now: bytes) -> None:
        self._seen = now
        self._found[:] = np.frombuffer(now, np.uint8)
        lost = np.flatnonzero((self._found == 0) & ~self._resident)
        self.nowhere = int(lost[0]) if len(lost) else -1

    def missing(self, ids: torch.Tensor) -> int:
        """One of `ids`, which are in range, that is not skipped; or -1."""
        wanted = ids[torch.from_numpy(self._found)[ids] == 0]
        return int(wanted[0]) if len(wanted) else -1

    def hot(self, ids: torch.Tensor) -> int:
        """How many of `ids`, which are in range, are of experts on the GPU."""
        return int((torch.from_numpy(self._found)[ids] == HOT).sum())
