"""Brings the routing of a batch to the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.streams.interface import Event, Stream

Counts = npt.NDArray[np.int64]


class RoutingReader:
    """Of one layer, one thread at a time.

    Args:
        num_experts: E. top_k: k.

    Attributes:
        read_at: where the latest batch's routing was known on its stream; None on CPU tensors.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        self._experts, self._top_k = num_experts, top_k
        self._counts: torch.Tensor | None = None
        self._pinned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.read_at: Event | None = None

    def count(self, stream: Stream | None, ids: torch.Tensor) -> Counts:
        """Pairs of each expert, int64 [E], of ids [T, k].

        Args:
            stream: that of the batch, for which the calling thread waits; None on CPU tensors.
        """
        experts = self._experts
        if stream is None:
            return pairs_of(ids.numpy(), experts)
        if self._counts is None:
            self._counts = stream.pinned((experts + 1,), torch.int64)
        with stream:
            known = torch.where((ids >= 0) & (ids < experts), ids, experts).to(torch.int64)
            found = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
            found.scatter_add_(0, known.flatten(), torch.ones_like(known.flatten()))
            stream.to_host(self._counts, found)
        self._wait(stream)
        counts: Counts = self._counts.numpy()[:experts].copy()
        return counts

    def read(
        self, stream: Stream | None, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """ids int64 [T, k] and weights float32 [T, k] of a short batch; `stream` as for `count`."""
        tokens = len(ids)
        if stream is None:
            return ids.numpy(), weights.detach().numpy()
        capacity = 1 << (tokens - 1).bit_length()
        if capacity not in self._pinned:
            shape = capacity, self._top_k
            pinned = stream.pinned(shape, torch.int64), stream.pinned(shape, torch.float32)
            self._pinned[capacity] = pinned
        chosen, scores = (tensor[:tokens] for tensor in self._pinned[capacity])
        with stream:
            stream.to_host(chosen, ids)
            stream.to_host(scores, weights.detach().resolve_neg())
        self._wait(stream)
        return chosen.numpy().copy(), scores.numpy().copy()

    def _wait(self, stream: Stream) -> None:
        self.read_at = stream.record(timed=True)
        stream.host_wait(self.read_at)


def pairs_of(ids: npt.NDArray[np.int64], experts: int) -> Counts:
    """Pairs of each of so many experts; ids out of range are none."""
    flat = ids.reshape(-1)
    return np.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
