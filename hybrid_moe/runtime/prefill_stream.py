"""Prefill streamed through the GPU: cold experts travel while the layer before computes.

    link | L: ahead | L: late | L+1: ahead ............... | L+2: ahead ...
    GPU  | attention, router of L | hot, then sent experts of L | attention of L+1 | ...
    CPU                           | the other cold experts of L |                  | ...

A long batch meets nearly every expert. Those with most pairs cost the CPU most, and the link no
more than others: they are sent, and the CPU computes the rest at the same time. How many, the
planner says (`prefill_loads.SendPlanner`), for the layer whose routing has just been counted and
ahead for the next one, of which the batch before says what to expect. An expert that no token takes
is never sent late, and one that came ahead in vain is not computed.

A batch goes by one mask: the CPU skips what the GPU has in slots, for good or for this batch. So
each pair runs once, wherever its expert is. Which half computes a pair depends on what was measured
before, and the last bits of a sum with it.

Short batches, such as steps of decode, send experts through the same slots, where `steps` says so:
late only, since one step says little about which experts the next one takes.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol

import torch

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.trace_file import TraceNote
from hybrid_moe.gpu_kernels.slot_experts import PREFILL_TOKENS
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.gpu_arguments import BACKENDS, HotOptions
from hybrid_moe.runtime.hot_half import HotHalf
from hybrid_moe.runtime.prefill_loads import PrefillLoad, SendPlanner
from hybrid_moe.runtime.sent_experts import SentExperts
from hybrid_moe.runtime.step_choices import BatchPlanner
from hybrid_moe.runtime.transient_slots import TransientSlots
from hybrid_moe.streams.interface import Event
from hybrid_moe.streams.link import Anchor, Link, Transfer, link_to
from hybrid_moe.text import format_bytes


class StreamMember(Protocol):
    """A layer, as far as the stream sees it: `streamed_layer.StreamedLayer`."""

    @property
    def index(self) -> int: ...

    def expected(self, tokens: int) -> PrefillLoad:
        """What a batch of so many tokens will find there."""

    def send_ahead(self, count: int) -> None:
        """Send so many experts for the next batch."""

    def give_back_ahead(self) -> None:
        """Free the slots of what came ahead."""


Swap = Callable[[int, int], None]
"""(Expert that goes down, expert that comes up): the two change places now."""

LetStay = Callable[[int, tuple[int, ...], Swap], tuple[int, ...]]
"""(Index of a layer, experts that are to be sent there for a batch, what swaps two of the layer) ->
those of the experts that have been swapped in, to stay."""


class PrefillStream:
    """Of the layers of one model on one device: `KTMoEWrapper(prefill_stream=...)` of each.

    Args:
        planner: says how many experts travel.
        slots: experts that are on their way or at work at the same time, of one layer and the next.
        memory: bytes of the device for them, instead of `slots`. Layers whose experts are stored in
            different ways have as much each.
        tokens: batches of so many tokens and more are streamed, each on its own merits: the planner
            may send none.
        link: the way to the device's memory; None for the device's own.
        steps: decides for shorter batches; None: the CPU computes all of their cold experts.

    Raises:
        ValueError: fewer than 2 slots, tokens that are not positive, or not one of `slots` and
            `memory`.
    """

    def __init__(
        self,
        planner: SendPlanner,
        slots: int | None = None,
        tokens: int = PREFILL_TOKENS,
        link: Link | None = None,
        *,
        memory: int | None = None,
        steps: BatchPlanner | None = None,
    ) -> None:
        if (slots is None) == (memory is None):
            raise ValueError("give slots or memory for streamed prefill, one of the two")
        if slots is not None and slots < 2:
            raise ValueError(f"slots is {slots}, must be at least 2: of one layer and of the next")
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}, must be at least 1")
        self.planner, self._slots, self._memory, self.tokens = planner, slots, memory, tokens
        self.steps = steps
        self._stays: weakref.WeakMethod[LetStay] | None = None
        self._link = link
        self._layers: dict[int, weakref.ref[StreamMember]] = {}
        self._transient: dict[Hashable, TransientSlots] = {}
        self._under_way: deque[SentExperts] = deque()
        self._last: tuple[int, Any] | None = None
        """Of the latest streamed batch: its layer, and when that was over."""
        self._lock = ProcessLock()
        self.turn = ProcessLock()
        """Held by whoever decides, sends or computes."""
        self._told: dict[Transfer, TraceNote] = {}
        """Notes of copies that wait for their times, while a trace is written."""
        self._anchor: Anchor | None = None
        trace.add_source(self)
        self.sent_bytes = 0
        """Copied to transient slots so far."""
        self.unused_bytes = 0
        """Of experts that came and that no token took."""

    @property
    def nbytes(self) -> int:
        """Bytes of the transient slots on the device."""
        return sum(slots.nbytes for slots in self._transient.values())

    def reserve(self, half: HotHalf) -> TransientSlots:
        """The slots for experts like those of `half`, which has been reserved.

        Raises:
            ValueError: the `memory` is less than two experts take.
            RuntimeError: the device has no room.
        """
        assert half.layout is not None
        with self._lock:
            if half.kind not in self._transient:
                slots, nbytes = self._slots, half.layout.nbytes
                if slots is None:
                    slots = min((self._memory or 0) // nbytes, 2 * half.num_experts)
                if slots < 2:
                    raise ValueError(
                        f"streamed prefill has {format_bytes(self._memory or 0)} of the device: an "
                        f"expert of layer {half.layer_idx} takes {format_bytes(nbytes)}, and there "
                        "must be room for two"
                    )
                self._transient[half.kind] = TransientSlots(half, slots)
            return self._transient[half.kind]

    def link(self, device: torch.device) -> Link:
        """The way to the device."""
        if self._link is None:
            self._link = link_to(device)
        return self._link

    def join(self, layer: StreamMember) -> None:
        """Take a loaded layer into the order of calls.

        Raises:
            ValueError: a living layer has its index.
        """
        with self._lock:
            other = self._layers.get(layer.index)
            if other is not None and other() is not None:
                raise ValueError(
                    f"the prefill_stream has a layer {layer.index} already: close it first; a "
                    "second copy of a model and a draft model need streams of their own"
                )
            self._layers[layer.index] = weakref.ref(layer)

    def leave(self, layer: StreamMember) -> None:
        """Take out a layer that is closed."""
        with self._lock:
            other = self._layers.get(layer.index)
            if other is not None and other() is layer:
                del self._layers[layer.index]

    def place_of(self, index: int) -> tuple[int, int]:
        """(How many layers are called before this one, how many there are)."""
        living = [i for i, layer in list(self._layers.items()) if layer() is not None]
        return sum(i < index for i in living), len(living)

    def let_stay(self, stays: LetStay) -> None:
        """Ask this method from now on, as long as its object lives, which experts stay that are to
        be sent for a short batch."""
        self._stays = weakref.WeakMethod(stays)

    def stays(self, layer: int, sent: tuple[int, ...], swap: Swap) -> tuple[int, ...]:
        """See `LetStay`."""
        stays = None if self._stays is None else self._stays()
        return () if stays is None or not sent else stays(layer, sent, swap)

    def after(self, index: int) -> StreamMember | None:
        """The layer that is called after this one; None behind the last."""
        later = sorted(i for i in self._layers if i > index)
        living = (self._layers[i]() for i in later)
        return next((layer for layer in living if layer is not None), None)

    def reclaim(self, keep: tuple[StreamMember | None, ...]) -> None:
        """Free the slots of what came ahead for layers that are not the next: their batch was
        another one than expected."""
        for reference in list(self._layers.values()):
            layer = reference()
            if layer is not None and layer not in keep:
                layer.give_back_ahead()

    def began(self, sent: SentExperts) -> None:
        """A batch is under way."""
        self._under_way.append(sent)

    def ended(self, layer: int, moment: Any) -> None:
        """The sum of a batch is there, at `moment`."""
        self._last = layer, moment

    def end_before(self, layer: int) -> Any:
        """When the layer before was over, if that was the latest streamed batch; else None."""
        if self._last is None:
            return None
        latest, moment = self._last
        following = self.after(latest)
        return moment if following is not None and following.index == layer else None

    def learn(self) -> None:
        """Tell the planners of what is over. Those that were dropped never are: they give way."""
        while self._under_way:
            times = self._under_way[0].times()
            if times is None and len(self._under_way) <= 2 * len(self._layers):
                break
            sent = self._under_way.popleft()
            if times is not None:
                sent.planner.note(times)
                if trace.is_recording():
                    sent.trace(self._anchor)
        if self._link is None:
            return
        for transfer in self._link.arrived():
            told = self._told.pop(transfer, None)
            if (seconds := transfer.seconds) is not None and transfer.nbytes:
                self.planner.note_link(transfer.nbytes, seconds)
                if self.steps is not None:
                    self.steps.note_link(transfer.nbytes, seconds)
                if told is not None and (span := transfer.span(self._anchor)) is not None:
                    trace.note(replace(told, begin=span[0], end=span[1]))

    def note_all(self) -> None:
        """`learn`, when a trace ends."""
        with self.turn:
            self.learn()

    def tell(self, transfer: Transfer, name: str, flow: str) -> None:
        """While a trace is written: what `transfer` is, for when its times are known."""
        if trace.is_recording():
            facts = {"bytes": transfer.nbytes}
            self._told[transfer] = TraceNote("link", name, 0, 0, facts, flow)

    def anchored(self, event: Event) -> None:
        """The host has just seen that `event` was reached."""
        self._anchor = event, time.monotonic_ns()

    def close_link(self) -> None:
        """Wait for the copies under way: a layer's memory is about to go."""
        if self._link is not None:
            self._link.close()


def declared_stream(value: Any, options: HotOptions | None) -> PrefillStream | None:
    """The constructor's `prefill_stream`, checked.

    Raises:
        TypeError: it is something else. ValueError: there is no `gpu_backend`.
    """
    if value is None:
        return None
    if not isinstance(value, PrefillStream):
        raise TypeError(
            "prefill_stream must be a hybrid_moe.runtime.prefill_stream.PrefillStream or None, not "
            f"{type(value).__name__}"
        )
    if options is None:
        raise ValueError(f"prefill_stream needs a gpu_backend: {' or '.join(map(repr, BACKENDS))}")
    return value
