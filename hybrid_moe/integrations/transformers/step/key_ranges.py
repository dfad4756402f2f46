"""Attention masks of language models as ranges of keys.

A causal mask, of a sliding window or not, with padding on the left, leaves each query token one
range of keys. `KeyRanges` says which in a few numbers; a tensor takes a byte for each pair of
tokens, a gigabyte at 32k. `key_ranges_mask` is what Transformers calls to make a mask: it returns
ranges, None where no mask is needed (as for SDPA), and for every other mask SDPA's tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hybrid_moe.runtime.torch_op import is_traced


@dataclass(slots=True)  # not frozen: one is made in every call, in half the time
class KeyRanges:
    """Query token i of Q, at place `keys - Q + i`, sees the keys from `first` of its sequence, but
    none that is `window` or more places before its own, up to its own.

    Attributes:
        keys: T, the last query token's own among them; a static cache may hold more behind them.
        window: 0 for none.
        first: int64 [B], the first key that is no padding; None: 0 for all.
    """

    keys: int
    window: int = 0
    first: torch.Tensor | None = None

    def tensor(self, queries: int, keys: int) -> torch.Tensor:
        """The mask, bool [B or 1, 1, Q, keys], for `keys` of which those past T are hidden."""
        key = torch.arange(keys)
        query = torch.arange(self.keys - queries, self.keys)[:, None]
        seen = key <= query
        if self.window:
            seen &= key > query - self.window
        if self.first is None:
            return seen[None, None]
        return seen & (key >= self.first[:, None, None, None])


def key_ranges_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> KeyRanges | torch.Tensor | None:
    """A mask for `attention.attention_forward`. Arguments as of Transformers' `sdpa_mask`, which
    makes those masks that are no ranges."""
    window = _window(mask_function, local_size)
    if (
        window is not None
        and allow_is_causal_skip  # else the model wants a tensor to work on
        and not use_vmap
        and not is_traced(attention_mask)
        and torch.device(device).type == "cpu"
    ):
        keys = int(q_offset) + q_length - kv_offset
        ranges = _ranges(keys, window, attention_mask, kv_offset)
        if ranges is not None and q_length <= keys <= kv_length:
            plain = ranges == KeyRanges(keys if q_length > 1 else kv_length)
            return None if plain and q_length in (1, keys) else ranges
    mask: torch.Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    return mask


def _window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """The sliding window of a mask function, 0 for plain causal; None: it is something else."""
    if mask_function is causal_mask_function:
        return 0
    if local_size and _same(mask_function, sliding_window_causal_mask_function(local_size)):
        return local_size
    return None


def _same(function: Any, other: Any) -> bool:
    """Whether two closures have the same code over the same values."""
    if function is other:
        return True
    if isinstance(function, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(function) == len(other) and all(map(_same, function, other))
    if not hasattr(function, "__code__") or not hasattr(other, "__code__"):
        return type(function) is type(other) is int and function == other
    return function.__code__ is other.__code__ and _same(
        tuple(cell.cell_contents for cell in function.__closure__ or ()),
        tuple(cell.cell_contents for cell in other.__closure__ or ()),
    )


def _ranges(
    keys: int, window: int, attention_mask: torch.Tensor | None, kv_offset: int
) -> KeyRanges | None:
    """The ranges of `keys` keys; None where padding is not on the left."""
    window = window if window < keys else 0
    if attention_mask is None:
        return KeyRanges(keys, window)
    if attention_mask.ndim != 2 or attention_mask.shape[1] < kv_offset + keys:
        return None
    real = attention_mask[:, kv_offset : kv_offset + keys]
    if real.all():
        return KeyRanges(keys, window)
    first = keys - real.sum(1)
    if not torch.equal(torch.arange(keys) >= first[:, None], real.bool()):
        return None
    return KeyRanges(keys, window, first)
