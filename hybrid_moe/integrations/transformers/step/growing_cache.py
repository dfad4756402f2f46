"""Cache layers of Transformers that grow in steps and return views.

Transformers' `DynamicLayer` concatenates: every step reads and writes all keys and values of a
layer, which at 8,192 tokens is a third of what a step moves. The layers here write new states into
room that they have, and hand out views of it: [batch, key heads, tokens, head dim], with the
dimensions of a head adjoining. Their content, and what they answer, is that of Transformers'
layers, from which they are derived; a view stays as it is until the layer's next update.

`use_cache` makes a model's `generate` use them. Which kind a layer of the model gets is what
Transformers' own `DynamicCache` of its config says: full and sliding-window layers become ours,
others (linear attention, compressed or indexed keys) stay as they are, and so does a cache that the
user passes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from hybrid_moe.runtime.torch_op import is_traced

BLOCK = 256
"""Tokens that a capacity is a multiple of."""


def capacity_for(tokens: int) -> int:
    """Room for a quarter more, in blocks: a token is then copied four times on average, however
    long the sequence gets, and memory that is not written yet is not resident."""
    return -(-(tokens + tokens // 4) // BLOCK) * BLOCK


class _Room:
    """Memory for states, [batch, heads, capacity, dim], of which a layer has a view.

    A view is recognised by its address and strides, so that a layer may cut it (`crop`) or put
    another tensor in its place.
    """

    __slots__ = ("_memory",)

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def drop(self) -> None:
        """Let go of the memory."""
        self._memory = None

    def _begin_of(self, view: torch.Tensor) -> int | None:
        """The token at which a view of the memory begins; None if it is elsewhere."""
        memory = self._memory
        if memory is None or view.stride() != memory.stride():
            return None
        begin = (view.data_ptr() - memory.data_ptr()) // (memory.stride(2) * memory.itemsize)
        return begin if 0 <= begin <= memory.shape[2] - view.shape[2] else None

    def _takes(self, states: torch.Tensor) -> bool:
        """Whether the memory is of the states' kind, and may be written."""
        memory = self._memory
        return (
            memory is not None
            and memory.shape[:2] == states.shape[:2]
            and memory.shape[3] == states.shape[3]
            and memory.dtype == states.dtype
            and memory.device == states.device
            and (torch.is_inference_mode_enabled() or not memory.is_inference())
        )

    def append(self, past: torch.Tensor, states: torch.Tensor, capacity: int) -> torch.Tensor:
        """`past`, [batch, heads, tokens, dim] or without elements, with `states` behind it.

        Where there is no room for them, both go to the front: of this memory if it has `capacity`
        tokens and old and new place of `past` do not meet, else of new memory.
        """
        tokens, added = past.shape[2] if past.numel() else 0, states.shape[2]
        memory, begin = self._memory, 0
        at = (self._begin_of(past) if tokens else 0) if self._takes(states) else None
        if memory is not None and at is not None and at + tokens + added <= memory.shape[2]:
            begin = at
        else:
            capacity = max(capacity, tokens + added)
            if memory is None or at is None or at < tokens or memory.shape[2] < capacity:
                shape = (*states.shape[:2], capacity, states.shape[3])
                self._memory = memory = states.new_empty(shape)
            if tokens:
                memory.narrow(2, 0, tokens).copy_(past)
        memory.narrow(2, begin + tokens, added).copy_(states)
        return memory.narrow(2, begin, tokens + added)


def _concatenates(past: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether states must be concatenated after all: to be differentiated or traced, or to be
    promoted or refused as torch does."""
    return (
        states.requires_grad
        or is_traced(states)
        or (
            past.numel() > 0
            and (
                past.requires_grad
                or past.dtype != states.dtype
                or past.device != states.device
                or past.shape[:2] != states.shape[:2]
                or past.shape[3:] != states.shape[3:]
            )
        )
    )


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Full attention: all tokens, with room for more."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_room, self._value_room = _Room(), _Room()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, tokens, dim]; returns views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if _concatenates(self.keys, key_states) or _concatenates(self.values, value_states):
            super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        capacity = capacity_for(self.get_seq_length() + key_states.shape[2])
        self.keys = self._key_room.append(self.keys, key_states, capacity)
        self.values = self._value_room.append(self.values, value_states, capacity)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop all states, and their memory."""
        super().reset()
        self._key_room.drop()
        self._value_room.drop()


class GrowingWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding window: the last `sliding_window - 1` tokens, in memory that is bounded.

    The window moves through a room that is some larger, and is copied to its front when it meets
    the end. A prefill that does not fit is returned as it is; only its end is kept. While past
    states are recorded (assisted decoding), all are kept until the next `crop`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window, **kwargs)
        self._key_room, self._value_room = _Room(), _Room()

    @property
    def _kept(self) -> int:
        return int(self.sliding_window) - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, tokens, dim]; returns those that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if (
            _concatenates(self.keys, key_states)
            or _concatenates(self.values, value_states)
            or not self._kept  # a window of one token: as Transformers has it
        ):
            seen: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return seen
        added = key_states.shape[2]
        self.cumulative_length += added
        if self.record_past:
            capacity = capacity_for((self.keys.shape[2] if self.keys.numel() else 0) + added)
            self.keys = self._key_room.append(self.keys, key_states, capacity)
            self.values = self._value_room.append(self.values, value_states, capacity)
            return _last(self.keys, self._kept + added), _last(self.values, self._kept + added)
        self.keys, seen_keys = self._add(self._key_room, self.keys, key_states)
        self.values, seen_values = self._add(self._value_room, self.values, value_states)
        return seen_keys, seen_values

    def _add(
        self, room: _Room, past: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is kept, what the new tokens may see)."""
        kept = self._kept
        capacity = -(-2 * kept // BLOCK) * BLOCK
        tokens, added = past.shape[2] if past.numel() else 0, states.shape[2]
        if tokens + added <= capacity:
            seen = room.append(past, states, capacity)
            return _last(seen, kept), seen
        seen = torch.cat([past, states], dim=2) if tokens else states
        return room.append(past[..., :0], _last(seen, kept), capacity), seen

    def reset(self) -> None:
        """Drop all states, and their memory."""
        super().reset()
        self._key_room.drop()
        self._value_room.drop()


def _last(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last so many tokens, or all if there are fewer."""
    excess = states.shape[2] - tokens
    return states.narrow(2, excess, tokens) if excess > 0 else states


def grow(cache: Cache) -> Cache:
    """Make the layers of an empty `DynamicCache` ours, in place; returns it. Layers of other kinds,
    and caches that are not exactly a `DynamicCache` or that are offloaded, stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return cache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers[:] = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: Any) -> Any:
    if type(layer) is DynamicLayer and not layer.is_initialized:
        return GrowingLayer()
    if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
        made = GrowingWindowLayer(layer.sliding_window)
        made.record_past = layer.record_past
        return made
    return layer


def growing_cache(config: Any) -> Cache:
    """An empty cache for a model of this config, as `generate` makes one after `use_cache`."""
    return grow(DynamicCache(config=config))


def use_cache(model: Any) -> None:
    """Let `model.generate` use caches of these layers wherever it makes a `DynamicCache`. Models
    that cannot generate are left alone."""
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = types.MethodType(_prepare_cache_for_generation, model)


def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """What `generate` calls; a cache that it makes is ours, one that was passed is not touched."""
    given = model_kwargs.get("past_key_values")
    prepare = type(self)._prepare_cache_for_generation
    result = prepare(self, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if made is not None and made is not given:
        grow(made)
    return result
