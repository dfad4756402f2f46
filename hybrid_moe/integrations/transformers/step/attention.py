"""Attention of Transformers models on the CPU: `attn_implementation="hybrid_moe"`.

A few query tokens (decoding) are a job of the pool, `cpu_kernels.attention_job`: keys and values
are read once from the cache for all query heads of a group. Many (prefill) are torch's flash
attention, which keeps no scores in memory, see `prefill`. Both know groups of query heads without
repeating keys and values, sliding windows, left padding, and *sinks*: a learned score for each head
that takes part in the softmax and has no value.

What neither computes goes to Transformers' SDPA, or with sinks to the model's own eager attention,
and is said once: masks that are no ranges of keys, gradients, dropout, attention weights as an
output, soft caps, position biases; without a word, graphs that are captured.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from typing import Any

import numpy as np
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid_moe.cpu_kernels.attention_job import AttentionCall, CachedAttention, split_count
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.integrations.transformers.guard import NAME
from hybrid_moe.integrations.transformers.step.key_ranges import KeyRanges, key_ranges_mask
from hybrid_moe.integrations.transformers.step.prefill import prefill
from hybrid_moe.logs import warn_once
from hybrid_moe.runtime.torch_op import is_traced

logger = logging.getLogger(__name__)

MOST_QUERIES = 16
"""Query tokens that the pool's kernel takes."""
_MOST_ROWS = 256

_Result = tuple[torch.Tensor, torch.Tensor | None]

_POOL = "_hybrid_moe_attention_pool"
"""Attribute of modules of the models that `use_attention` was called for; a copy has it too."""
_computing: weakref.WeakKeyDictionary[torch.nn.Module, _Decoder] = weakref.WeakKeyDictionary()


def use_attention(model: Any, pool: PoolConfig | None = None) -> bool:
    """Let a model's attention run here, if it is on the CPU and Transformers dispatches it.

    A model that was told to use another implementation than its default keeps that.

    Args:
        pool: worker threads; None: one for each available core.

    Returns:
        Whether it does now. Why not is logged.
    """
    register_attention()
    reason = _refusal(model)
    if reason:
        logger.info("attention stays as it is: %s", reason)
        return False
    part = "text_config" if "text_config" in model.config.sub_configs else ""
    model.set_attn_implementation({part: NAME} if part else NAME)
    pool = pool or PoolConfig.choose(None, None)
    for module in model.modules():
        module.__dict__[_POOL] = pool
    return True


def register_attention() -> None:
    """Make the name known to Transformers. Idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, key_ranges_mask)


def _refusal(model: Any) -> str:
    """Why a model's attention is not for us, or nothing."""
    name = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        return f"{name} has no attention that Transformers dispatches"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        return f"{name} is on {device}"
    text = model.config.get_text_config()
    default = model._check_and_adjust_attn_implementation(None)
    if text._attn_implementation not in (default, None):
        return f"{name} was loaded with attn_implementation={text._attn_implementation!r}"
    if not model._can_set_attn_implementation():
        return f"{name} does not use Transformers' attention interface"
    # who supports one of these takes masks as they come, and does not look into them
    if not (model._supports_flex_attn or model._supports_flash_attn):
        return f"the attention of {name} needs masks as tensors"
    if not model._supports_sdpa and not any(hasattr(m, "sinks") for m in model.modules()):
        return f"the attention of {name} computes something that SDPA does not"
    return ""


class _Decoder:
    """The pool's attention for one module."""

    def __init__(self, key_dim: int, value_dim: int, pool: PoolConfig) -> None:
        self.key_dim, self.value_dim = key_dim, value_dim
        self.attention = _attention(key_dim, value_dim, pool)
        self.scale: np.ndarray[Any, np.dtype[np.float32]] = np.zeros(1, np.float32)
        self.scale_address = self.scale.ctypes.data
        self.factor: float | None = None

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: KeyRanges,
        factor: float, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Output bf16 [B, Q, query heads, value_dim]."""
        sequences, query_heads, queries, _ = query.shape
        key_heads, keys, window, first = key.shape[1], ranges.keys, ranges.window, ranges.first
        if factor != self.factor:
            self.scale[0] = self.factor = factor
        sunk = sink_bytes = 0
        if sinks is not None:
            if sinks.dtype not in (torch.bfloat16, torch.float32) or not sinks.is_contiguous():
                sinks = sinks.detach().to(torch.float32).contiguous()
            sunk, sink_bytes = sinks.data_ptr(), sinks.itemsize
        query = query.contiguous()
        out = torch.empty((sequences, queries, query_heads, self.value_dim), dtype=torch.bfloat16)
        k_sequence, k_head, k_key, _ = key.stride()
        v_sequence, v_head, v_key, _ = value.stride()
        call = AttentionCall(
            sequences, key_heads, queries, query_heads // key_heads * queries, keys,
            split_count(keys, queries, window), window,
            0 if first is None else first.data_ptr(), self.scale_address, sunk, sink_bytes,
            query.data_ptr(), key.data_ptr(), 2 * k_sequence, 2 * k_head, 2 * k_key,
            value.data_ptr(), 2 * v_sequence, 2 * v_head, 2 * v_key, out.data_ptr(),
        )  # fmt: skip
        self.attention.run(call, (query, key, value, first, self.scale, sinks, out))
        return out


_attentions: dict[tuple[int, int, PoolConfig], CachedAttention] = {}
os.register_at_fork(after_in_child=_attentions.clear)  # the parent's threads are not the child's


def _attention(key_dim: int, value_dim: int, pool: PoolConfig) -> CachedAttention:
    """Shared by all layers of these sizes."""
    key = (key_dim, value_dim, pool)
    return _attentions.get(key) or _attentions.setdefault(
        key, CachedAttention(key_dim, value_dim, pool)
    )


def _decoder(module: torch.nn.Module, key_dim: int, value_dim: int) -> _Decoder:
    found = _computing.get(module)
    if found is None or (found.key_dim, found.value_dim) != (key_dim, value_dim):
        pool = module.__dict__.get(_POOL) or PoolConfig.choose(None, None)
        found = _computing[module] = _Decoder(key_dim, value_dim, pool)
    return found


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyRanges | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> _Result:
    """Attention as Transformers calls it.

    Args:
        query: [B, query heads, Q, key dim].
        key, value: [B, key heads, T, key dim or value dim], views of a cache.
        attention_mask: of `key_ranges_mask`, or any mask tensor that SDPA takes; None: causal.
        dropout: of attention weights.
        scaling: of scores; None: 1 / sqrt(key dim).
        is_causal: False: all keys are seen.
        s_aux: sinks [query heads], or None.
        **kwargs: more of the model's; those that change the result go to another implementation.

    Returns:
        (output [B, Q, query heads, value dim], attention weights or None).
    """
    ranges = attention_mask
    if ranges is None and (is_causal if is_causal is not None else _is_causal(module)):
        queries, keys = query.shape[2], key.shape[2]
        # as Transformers' SDPA has it: no mask, and several tokens: those are the first ones
        ranges = KeyRanges(keys if queries == 1 else queries) if queries <= keys else None
    reason = _elsewhere(query, key, value, ranges, dropout, s_aux, kwargs)
    if reason is not None:
        if reason:
            warn_once(f"attention of {type(module).__name__} is not computed by the pool: {reason}")
        return _other(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    assert isinstance(ranges, KeyRanges)
    factor = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    if _is_small(query, key):
        decoder = _decoder(module, key.shape[3], value.shape[3])
        return decoder.run(query, key, value, ranges, factor, s_aux), None
    return prefill(query, key, value, ranges, factor, s_aux), None


def _is_causal(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True))


def _is_small(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the pool's kernel takes so many query tokens."""
    queries = query.shape[2]
    return queries <= MOST_QUERIES and query.shape[1] // key.shape[1] * queries <= _MOST_ROWS


def _elsewhere(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Any,
    dropout: float,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call is not computed here; "" where that needs no notice; None if it is."""
    if is_traced(query):
        return ""
    if not isinstance(ranges, KeyRanges):
        return "" if ranges is None else "its mask is no range of keys"
    if kwargs.get("softcap") is not None:
        return "its scores have a soft cap"
    if kwargs.get("position_bias") is not None:
        return "its scores have a position bias"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if dropout:
        return "dropout"
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, sinks)
    ):
        return "gradients are asked for"
    if not query.dtype == key.dtype == value.dtype == torch.bfloat16:
        return f"its states are {query.dtype}, not bfloat16"
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        return ""
    (sequences, heads, _, dim), (_, key_heads, keys, _) = query.shape, key.shape
    if (
        key.shape != (sequences, key_heads, keys, dim)
        or value.shape[:3] != key.shape[:3]
        or not key_heads
        or heads % key_heads
        or (ranges.first is not None and ranges.first.shape != (sequences,))
    ):
        return "its states are not of the same sequences and heads"
    if dim % 16 or value.shape[3] % 16:
        return "heads whose size is no multiple of 16"
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "dimensions of a head do not adjoin"
    if ranges.keys > keys:
        raise ValueError(f"a mask of {ranges.keys} keys for {keys}")
    return None


def _other(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyRanges | torch.Tensor | None,
    *,
    s_aux: torch.Tensor | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> _Result:
    """Transformers' SDPA; the model's own eager attention for what that does not compute."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    needs_eager = (
        s_aux is not None or kwargs.get("softcap") is not None or kwargs.get("output_attentions")
    )
    if isinstance(mask, KeyRanges):
        mask = mask.tensor(query.shape[2], key.shape[2])
    if not needs_eager or eager is None:
        result: _Result = sdpa_attention_forward(
            module, query, key, value, mask, is_causal=is_causal, **kwargs
        )
        return result
    if mask is None and (is_causal if is_causal is not None else _is_causal(module)):
        queries, keys = query.shape[2], key.shape[2]
        mask = KeyRanges(keys if queries == 1 else queries).tensor(queries, keys)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    weighed: _Result = eager(module, query, key, value, mask, s_aux=s_aux, **kwargs)
    return weighed
