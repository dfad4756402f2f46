"""Expert deferral: the less important experts of a layer are added one MoE layer later.

With n deferred experts per token, a layer's output holds the k - n experts of highest routing
weight; the others run while the GPU is already busy with what follows, and their sum is added to
the output of the next MoE layer (Chen et al., KTransformers, SOSP 2025, section 4: up to 1.45x
decode at under 0.5 % accuracy).

"Next" is the living layer of the same model with the next higher index, however many dense layers
lie between. The last layer of a model has none and defers nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import ClassVar, Protocol

import torch

from hybrid_moe.locks import ProcessLock
from hybrid_moe.submission import Launched


def split_deferred(
    ids: torch.Tensor, scores: torch.Tensor, protected_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a routing into experts that run now and experts that may run later.

    The `protected_k` slots of highest score of each token are protected (on equal scores, earlier
    slots first). As in kt-kernel, protection belongs to the expert in the whole batch: an expert
    that any token protects runs now for all its tokens, since its weights are read anyway. A large
    batch therefore defers next to nothing.

    Args:
        ids: integer [B, k]; ids below 0 or at and above `num_experts` are nobody's.
        scores: [B, k], routing weights.
        protected_k: slots per token that must run now; 0 or less defers all, k or more none.
        num_experts: E.

    Returns:
        (immediate, deferred), each of the shape, dtype and device of `ids`: every valid id is in
        exactly one of them, at its place; all other places are -1. No synchronization: usable on
        a GPU and under capture.
    """
    nobody = torch.full_like(ids, -1)
    valid = (ids >= 0) & (ids < num_experts)
    if protected_k <= 0:
        return nobody, torch.where(valid, ids, nobody)
    if protected_k >= ids.shape[1]:
        return torch.where(valid, ids, nobody), nobody
    ranked = torch.where(valid, scores.to(torch.float32), float("-inf"))
    top = ranked.argsort(dim=1, descending=True, stable=True)[:, :protected_k]
    expert = torch.where(valid, ids, num_experts).to(torch.int64)  # one place more, for nobody
    protected = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids.device)
    protected.scatter_(0, expert.gather(1, top).flatten(), True)
    now = protected[expert]
    return torch.where(now & valid, ids, nobody), torch.where(~now & valid, ids, nobody)


class Member(Protocol):
    """A layer, as far as a chain sees it."""

    @property
    def layer_idx(self) -> int: ...


class Chain:
    """The living MoE layers of one model, in the order of their indices, and the deferred jobs
    under way between them.

    Layers of one model share a key (checkpoint, sizes, pools). A second layer of the same index
    and key belongs to a second copy of the model, and opens a chain of its own; models are
    therefore constructed one after the other, as every runtime does.
    """

    _newest: ClassVar[weakref.WeakValueDictionary[Hashable, Chain]] = weakref.WeakValueDictionary()
    _lock: ClassVar[ProcessLock] = ProcessLock()

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()
        self._deferred: dict[int, tuple[int, Launched]] = {}  # destination -> (origin, job)

    @classmethod
    def join(cls, key: Hashable, layer: Member) -> Chain:
        """Add `layer` to the newest chain of `key` that has a place for its index."""
        with cls._lock:
            chain = cls._newest.get(key)
            if chain is None or layer.layer_idx in chain._members:
                chain = cls._newest[key] = cls()
            chain._members[layer.layer_idx] = layer
            return chain

    @property
    def has_deferred(self) -> bool:
        """Whether any layer waits for what another has deferred to it."""
        return bool(self._deferred)

    def after(self, layer_idx: int) -> int | None:
        """Index of the next living layer, or None for the last one."""
        return min((i for i in self._members if i > layer_idx), default=None)

    def leave(self, layer_idx: int) -> None:
        """Drop what was deferred to a layer that is closed."""
        _, job = self._deferred.pop(layer_idx, (0, None))
        if job is not None:
            job.discard()
        self._members.pop(layer_idx, None)

    def check_free(self, origin: int, destination: int) -> None:
        """Raise `RuntimeError` if an earlier deferred job for `destination` was never collected.

        The job is dropped, so that the next call starts clean.
        """
        if destination in self._deferred:
            earlier, job = self._deferred.pop(destination)
            job.discard()
            raise RuntimeError(
                f"layer {origin} was called again before layer {destination} collected the experts "
                f"that layer {earlier} had deferred to it; call the layers in order, or set "
                "max_deferred_experts_per_token=0"
            )

    def defer(self, origin: int, destination: int, job: Launched) -> None:
        """Leave `job` to be collected by `destination`."""
        self._deferred[destination] = (origin, job)

    def collect(self, destination: int, tokens: int) -> Launched | None:
        """The job that was deferred to `destination`, or None.

        Raises:
            RuntimeError: it has another number of tokens than `destination` was called with.
        """
        origin, job = self._deferred.pop(destination, (0, None))
        if job is not None and job.tokens != tokens:
            job.discard()
            raise RuntimeError(
                f"layer {destination} was called with {tokens} tokens, but layer {origin} deferred "
                f"experts of {job.tokens} tokens to it; call the layers in order, or set "
                "max_deferred_experts_per_token=0"
            )
        return job
