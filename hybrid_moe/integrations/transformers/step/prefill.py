"""Attention of many query tokens: torch's flash attention on the CPU, in memory that is bounded.

It keeps a block of scores, never all of them; what it lacks is made from it:

    grouped queries   the heads of a group are a batch of their own, and keys and values are
                      expanded over them without a copy
    cached keys       two parts, keys before the query tokens (all are seen) and their own (causal),
                      put together by the logarithms of their sums, which flash attention returns
    sinks             out * sigmoid(lse - sink) is the softmax with one more score that has no value
    sliding windows   blocks of query tokens with the keys that they see, and a mask of that size
    left padding      each sequence alone, without its padding
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hybrid_moe.integrations.transformers.step.key_ranges import KeyRanges

BLOCK = 512
"""Query tokens of a block in front of a sliding window; at least a window."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_Partial = tuple[torch.Tensor, torch.Tensor]
"""Output [.., Q, value dim], and the logarithm of the sum of exponentiated scores [.., Q]."""


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention without gradients.

    Args:
        query: [B, query heads, Q, key dim].
        key, value: [B, key heads, at least T, key dim or value dim].
        ranges: what query tokens see.
        scale: of scores.
        sinks: [query heads], or None.

    Returns:
        [B, Q, query heads, value dim]; zeros for query tokens that are padding.
    """
    sequences, query_heads, queries, _ = query.shape
    value_dim = value.shape[3]
    out = query.new_zeros((sequences, queries, query_heads, value_dim))
    if not out.numel():
        return out
    sunk = None if sinks is None else sinks.detach().float().view(key.shape[1], -1, 1)
    for some, first in _sequences(ranges, sequences):
        skipped = max(0, first - (ranges.keys - queries))  # query tokens that are padding
        if skipped >= queries:
            continue
        k, v = (t[some, :, first : ranges.keys] for t in (key, value))
        q = _split(query[some, :, skipped:], 1, (key.shape[1], -1))
        # flash attention takes heads of one size; zeros change neither scores nor values
        size = max(k.shape[3], value_dim)
        q, k, v = (_widened(t, size) for t in (q, k, v))
        for begin, (partial, lse) in _blocks(q, k, v, ranges.window, scale):
            partial = partial[..., :value_dim]
            end = skipped + begin + partial.shape[3]
            to = _split(out[some, skipped + begin : end], 2, partial.shape[1:3])
            to = to.permute(0, 2, 3, 1, 4)
            if sunk is None:
                to.copy_(partial)
            else:  # in float32, rounded once
                torch.mul(partial, torch.sigmoid(lse - sunk).unsqueeze(-1), out=to)
    return out


def _widened(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros behind the last dimension up to `size`."""
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _split(tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """A view in which one dimension is several."""
    return tensor.view(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def _sequences(ranges: KeyRanges, sequences: int) -> Iterator[tuple[slice, int]]:
    """(sequences, first key that is no padding): all at once where none has any."""
    if ranges.first is None:
        yield slice(0, sequences), 0
        return
    for index, first in enumerate(ranges.first.tolist()):
        yield slice(index, index + 1), first


def _blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
) -> Iterator[tuple[int, _Partial]]:
    """(first query token, partial) of blocks of query tokens [B, key heads, G, Q, dim], which are
    the last ones of the keys [B, key heads, T, dim]."""
    queries, past = q.shape[3], k.shape[2] - q.shape[3]
    if not window or window >= k.shape[2]:
        own = _attend(q, k[:, :, past:], v[:, :, past:], scale, causal=True)
        if past:
            own = _together(own, _attend(q, k[:, :, :past], v[:, :, :past], scale))
        yield 0, own
        return
    size = max(BLOCK, window)
    for begin in range(0, queries, size):
        end = min(queries, begin + size)
        low = max(0, past + begin - window + 1)
        keys = slice(low, past + end)
        seen = KeyRanges(past + end - low, window).tensor(end - begin, past + end - low)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        yield begin, _attend(q[:, :, :, begin:end], k[:, :, keys], v[:, :, keys], scale, mask=mask)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> _Partial:
    """Flash attention, groups of query heads as heads of a batch."""
    shape = q.shape[:3]
    k, v = (t.flatten(0, 1).unsqueeze(1).expand(-1, shape[2], -1, -1) for t in (k, v))
    out, lse = _flash(q.flatten(0, 1), k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return _split(out, 0, shape[:2]), _split(lse, 0, shape[:2])


def _together(a: _Partial, b: _Partial) -> _Partial:
    """Two parts of the keys as one."""
    lse = torch.logaddexp(a[1], b[1])
    weights = [torch.exp(part[1] - lse).unsqueeze(-1) for part in (a, b)]
    return (a[0] * weights[0] + b[0] * weights[1]).to(a[0].dtype), lse
