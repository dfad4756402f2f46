"""Expert deferral: the less important experts of a layer are added one MoE layer later.

With n deferred experts per token, a layer's output holds the k - n experts of highest routing
weight; the others run while the GPU is already busy with what follows, and their sum is added to
the output of the next MoE layer (Chen et al., KTransformers, SOSP 2025, section 4: up to 1.45x
decode at under 0.5 % accuracy).

"Next" is the loaded layer of the same model with the next higher index, however many dense layers
lie between. The last layer of a model has none and defers nothing. Which layers are one model is
declared by a `DeferralChain`; `runtime.construction_order` has what kt-kernel's own arguments say
about it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.submission import Started, discard

logger = logging.getLogger(__name__)


def split_deferred(
    ids: torch.Tensor, scores: torch.Tensor, protected_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a routing into experts that run now and experts that may run later.

    The `protected_k` slots of highest score of each token are protected (on equal scores, earlier
    slots first). As in kt-kernel, protection belongs to the expert in the whole batch: an expert
    that any token protects runs now for all its tokens, since its weights are read anyway. A large
    batch therefore defers next to nothing.

    Args:
        ids: integer [B, k]; ids below 0 or at and above `num_experts` are out of range.
        scores: [B, k], routing weights.
        protected_k: slots per token that must run now; 0 or less defers all, k or more none.
        num_experts: E.

    Returns:
        (immediate, deferred), each of the shape, dtype and device of `ids`: every valid id is in
        exactly one of them, at its place; all other places are -1. No synchronization: usable on
        a GPU and under capture.
    """
    none = torch.full_like(ids, -1)
    valid = (ids >= 0) & (ids < num_experts)
    if protected_k <= 0:
        return none, torch.where(valid, ids, none)
    if protected_k >= ids.shape[1]:
        return torch.where(valid, ids, none), none
    ranked = torch.where(valid, scores.to(torch.float32), float("-inf"))
    top = ranked.argsort(dim=1, descending=True, stable=True)[:, :protected_k]
    expert = torch.where(valid, ids, num_experts).to(torch.int64)  # E: out of range
    protected = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids.device)
    protected.scatter_(0, expert.gather(1, top).flatten(), True)
    now = protected[expert]
    return torch.where(now & valid, ids, none), torch.where(~now & valid, ids, none)


def split_off(ids: torch.Tensor, later: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`split_deferred` where it is known which experts run later: their pairs go, and no others."""
    is_later = torch.isin(ids, torch.tensor(later, dtype=ids.dtype, device=ids.device))
    none = torch.full_like(ids, -1)
    return torch.where(is_later, none, ids), torch.where(is_later, ids, none)


class ChainedLayer(Protocol):
    """A layer, as far as a chain sees it."""

    @property
    def layer_idx(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def loaded(self) -> bool: ...
    def drop(self) -> None:
        """Drop a submission that was not synced."""


@dataclass(frozen=True)
class Carried:
    """A job on its way from one layer to the next."""

    origin: int
    destination: int
    job: Started


class DeferralChain:
    """Declares which wrappers are the MoE layers of one model, in the order of their indices.

    Whoever builds a model makes one chain and gives it to each of its layers, and to no other
    layer: a draft model, or a second copy, has a chain of its own. The chain does not keep its
    layers alive. Layers may be closed and made anew; a deferred job to a layer that is gone is
    dropped with it.

    One thread at a time may call the layers of one chain.

    Args:
        per_thread: several may, each at a step of its own: what a layer has deferred is collected
            by the thread that called it, which must sync each layer before it calls the next. A
            step that is given up ends where the thread begins another one.
    """

    def __init__(self, *, per_thread: bool = False) -> None:
        self._layers: weakref.WeakValueDictionary[int, ChainedLayer] = weakref.WeakValueDictionary()
        self._lock = ProcessLock()
        self._per_thread = per_thread
        self._under_way: Any = threading.local() if per_thread else SimpleNamespace()

    @property
    def carried(self) -> Carried | None:
        """What the layer that was called last has deferred. No more than one job is under way:
        the next layer must collect it before any other is called."""
        carried: Carried | None = getattr(self._under_way, "carried", None)
        return carried

    @carried.setter
    def carried(self, carried: Carried | None) -> None:
        self._under_way.carried = carried

    def join(self, layer: ChainedLayer) -> None:
        """Give `layer` the place of its index.

        Raises:
            ValueError: a living layer has that index, or another hidden size.
        """
        with self._lock:
            for other in list(self._layers.values()):
                if other.hidden_size != layer.hidden_size:
                    raise ValueError(
                        f"hidden_size is {layer.hidden_size}, but layer {other.layer_idx} of the "
                        f"same deferral_chain has {other.hidden_size}: a chain is for one model"
                    )
            if layer.layer_idx in self._layers:
                raise ValueError(
                    f"the deferral_chain has a layer {layer.layer_idx} already: close it first; a "
                    "second copy of a model and a draft model need chains of their own"
                )
            self._layers[layer.layer_idx] = layer
        if self.carried is not None and self.carried.destination == layer.layer_idx:
            self._drop_carried()  # it was meant for the layer whose place this one takes

    def after(self, layer_idx: int) -> int | None:
        """Index of the next living layer that is loaded, or None for the last one."""
        later = [i for i, m in self._layers.items() if i > layer_idx and m.loaded]
        return min(later, default=None)

    def log_last(self, layer_idx: int) -> None:
        """Log why `after` gave None."""
        logger.info(
            "layer %d has no MoE layer after it: none of its experts is deferred", layer_idx
        )

    def take(self, layer_idx: int, tokens: int) -> Started | None:
        """The job that was deferred to layer `layer_idx`, which is being called; None for none.

        Raises:
            RuntimeError: the layer is not the one that was to be called next, or not with so many
                tokens. The step is lost; everything under way is dropped, and the next one starts
                clean.
        """
        carried = self.carried
        if carried is None:
            return None
        begins_anew = self._per_thread and layer_idx <= carried.origin
        if begins_anew or carried.destination not in self._layers:
            self._drop_carried()
            return None
        if carried.destination != layer_idx:
            problem = (
                f"layer {layer_idx} was called before layer {carried.destination} collected the "
                f"experts that layer {carried.origin} had deferred to it"
            )
        elif carried.job.tokens != tokens:
            problem = (
                f"layer {layer_idx} was called with {tokens} tokens, but layer {carried.origin} "
                f"deferred experts of {carried.job.tokens} tokens to it"
            )
        else:
            self.carried = None
            return carried.job
        self.reset()
        raise RuntimeError(
            f"{problem}; call the layers in order, or set max_deferred_experts_per_token=0; "
            "after a step that failed call reset()"
        )

    def carry(self, origin: int, destination: int, job: Started) -> None:
        """Leave `job` to be collected by `destination`."""
        self.carried = Carried(origin, destination, job)

    def drop(self, origin: int) -> None:
        """Drop what layer `origin` has deferred, if that is under way."""
        if self.carried is not None and self.carried.origin == origin:
            self._drop_carried()

    def leave(self, layer: ChainedLayer) -> None:
        """Take out a layer that is closed, with what was deferred to it."""
        with self._lock:
            if self._layers.get(layer.layer_idx) is not layer:
                return
            del self._layers[layer.layer_idx]
        if self.carried is not None and self.carried.destination == layer.layer_idx:
            self._drop_carried()

    def reset(self) -> None:
        """Drop everything under way in the layers: to be called when a step was given up between
        its first and its last layer. Does nothing where nothing is under way."""
        self._drop_carried()
        if not self._per_thread:  # else a submission that was not synced is another thread's
            for layer in list(self._layers.values()):
                layer.drop()

    def _drop_carried(self) -> None:
        carried, self.carried = self.carried, None
        if carried is not None:
            discard(carried.job, carried.origin)


def declared_chain(value: Any) -> DeferralChain | None:
    """The constructor's `deferral_chain`, checked."""
    if value is not None and not isinstance(value, DeferralChain):
        raise TypeError(
            f"deferral_chain must be a hybrid_moe.DeferralChain or None, not {type(value).__name__}"
        )
    return value
