"""What wrappers of one model must do, call by call: values, errors, and what is dropped.

    submit ─► pending ─► sync ─► output = own experts of now + what the layer before deferred
                 └──── deferred experts: carried to the next loaded layer of the chain

A submission over a pending one, and a layer called while something is carried to another one,
raise once and drop everything under way in the chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid_moe.runtime.deferral import split_deferred
from hybrid_moe.wrapper import KTMoEWrapper
from tests.fuzz.generate import Call, Sizes, Weights
from tests.reference import Evaluation, added

Expected = tuple[type[Exception], str]
"""The error that a call must raise: its type, and a part of its message."""


@dataclass
class Promise:
    """What a sync must return or raise."""

    call: Call
    value: Evaluation | None
    fault: Expected | None
    random: bool


@dataclass
class Carried:
    """Deferred experts on their way."""

    origin: int
    destination: int
    tokens: int
    value: Evaluation
    random: bool


@dataclass(eq=False)
class Layer:
    """One wrapper and what is known of it.

    Attributes:
        linked: it is in its model's chain.
        resident: bool [E], loaded experts.
        mask: bool [E], experts on the GPU as the wrapper must see them now.
    """

    index: int
    wrapper: KTMoEWrapper
    weights: Weights
    deferred: int
    strict: bool
    linked: bool
    resident: Any
    mask: Any
    promise: Promise | None = None
    counted: int = 0


@dataclass
class Oracle:
    """The layers of one model.

    Attributes:
        sizes: of all of them.
        declared: they have a chain that was given to them.
        layers: by index, the closed and dropped ones not.
        whole: no layer of the chain has gone.
    """

    sizes: Sizes
    declared: bool
    layers: dict[int, Layer] = field(default_factory=dict)
    carried: Carried | None = None
    whole: bool = True

    def after(self, layer: Layer) -> int | None:
        """Where the layer defers to."""
        if not (layer.linked and layer.deferred and (self.declared or self.whole)):
            return None
        later = [i for i, other in self.layers.items() if i > layer.index and other.linked]
        return min(later, default=None)

    def reset(self, layer: Layer) -> None:
        """Everything under way in the layer's chain is dropped."""
        layer.promise = None
        if layer.linked:
            self.carried = None
            for other in self.layers.values():
                if other.linked:
                    other.promise = None

    def gone(self, layer: Layer, closed: bool) -> None:
        """The layer is closed or dropped. What was deferred to it goes with it; what it has
        deferred itself only if it is closed with a submission under way."""
        del self.layers[layer.index]
        self.whole = self.whole and not layer.linked
        carried = self.carried
        if layer.linked and carried is not None:
            given_up = closed and layer.promise is not None and carried.origin == layer.index
            if given_up or carried.destination == layer.index:
                self.carried = None

    def refused(self, layer: Layer) -> Expected | None:
        """What a well-formed submission raises because of what is under way."""
        error: Expected | None = None
        if layer.promise is not None:
            error = RuntimeError, "has a submission already"
        elif layer.linked and self.carried and self.carried.destination != layer.index:
            error = RuntimeError, f"was called before layer {self.carried.destination}"
        if error is not None:
            self.reset(layer)
        return error

    def mismatched(self, layer: Layer, tokens: int) -> Expected | None:
        """What a submission of another number of tokens than was deferred raises."""
        carried = self.carried
        if not layer.linked or carried is None or carried.tokens == tokens:
            return None
        self.reset(layer)
        return RuntimeError, f"was called with {tokens} tokens"

    def failed(self, layer: Layer) -> None:
        """A submission was taken up and failed: what came in for it is lost."""
        if layer.linked:
            self.carried = None

    def submitted(self, layer: Layer, call: Call) -> None:
        """A submission that was accepted."""
        sizes, skip = self.sizes, layer.mask.copy()
        ids = call.ids.to(torch.int64)
        nobody = (ids < 0) | (ids >= sizes.E)
        layer.counted += int(nobody.sum())
        incoming, self.carried = (self.carried, None) if layer.linked else (None, self.carried)
        fault = self._fault(layer, ids, nobody, skip)
        if fault is not None:
            layer.promise = Promise(call, None, fault, False)
            return
        destination = self.after(layer)
        now, later = ids, None
        if destination is not None:
            now, later = split_deferred(ids, call.weights, sizes.k - layer.deferred, sizes.E)
        value = layer.weights.expected(sizes, call, now, skip)
        random = call.distinct
        if later is not None and destination is not None:
            late = layer.weights.expected(sizes, call, later, skip)
            self.carried = Carried(layer.index, destination, call.tokens, late, random)
        if incoming is not None:
            value, random = added(value, incoming.value), random and incoming.random
        layer.promise = Promise(call, value, None, random)

    def _fault(
        self, layer: Layer, ids: torch.Tensor, nobody: torch.Tensor, skip: Any
    ) -> Expected | None:
        if layer.strict and bool(nobody.any()):
            return IndexError, f"{int(nobody.sum())} of the ids in topk_ids are outside"
        absent = ~(layer.resident | skip)
        named = ids[~nobody].unique().numpy()
        lost = [e for e in named if absent[e]]
        return (RuntimeError, "which was not loaded") if lost else None
