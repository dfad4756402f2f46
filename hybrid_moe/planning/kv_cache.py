"""Bytes of the KV cache, by the kind of attention that `config.json` describes.

A cache is a sum of rows: so many layers, each with so many tokens of so many bytes. SGLang keeps
pools (its sizes are those of version 0.5.23), Transformers one cache for each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_moe.formats.strips import round_up

PAGE = 256
"""Tokens to which SGLang's pools are rounded; the largest page of any attention kernel."""

_V4_RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
_SLIDING = frozenset(
    {"sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention"}
)
"""Types of layers that keep a window of the context."""

_NO_CACHE = frozenset(
    {
        "linear_attention",
        "conv",
        "short_conv",
        "mamba",
        "mamba2",
        "recurrent",
        "moe",
        "mlp",
        "dummy",
    }
)
"""Types of layers that keep nothing which grows with the context. A type that is in neither set
counts as full attention: rather too large a cache than too small a one."""

_BF16, _F32 = 2, 4


@dataclass(frozen=True)
class CacheRow:
    """Some layers of a cache.

    Attributes:
        what: kind of attention.
        layers: how many.
        tokens: entries of each.
        nbytes: bytes of an entry.
        heads: KV heads, which GPUs share; where there are more GPUs than heads, some have the same.
            0: each has all of it.
    """

    what: str
    layers: int
    tokens: int
    nbytes: float
    heads: int = 0

    def per_gpu(self, gpus: int) -> int:
        """Bytes on one of so many GPUs."""
        parts = min(gpus, self.heads) or 1
        return round(self.layers * self.tokens * self.nbytes / parts)

    @property
    def formula(self) -> str:
        """The product in words."""
        return f"{self.what}: {self.layers} layers x {self.tokens} x {self.nbytes:g} B"


@dataclass(frozen=True)
class KvCache:
    """A cache: its rows, and the pool sizes that SGLang is told.

    Attributes:
        rows: what it consists of.
        tokens: of the main pool.
        window_tokens: of the pool of sliding-window layers; None where there are none.
    """

    rows: tuple[CacheRow, ...]
    tokens: int
    window_tokens: int | None = None

    def per_gpu(self, gpus: int = 1) -> int:
        """Bytes on one of so many GPUs."""
        return sum(row.per_gpu(gpus) for row in self.rows)

    @property
    def formula(self) -> str:
        """How the size comes about."""
        return "; ".join(row.formula for row in self.rows)

    @property
    def window_ratio(self) -> float | None:
        """What `--swa-full-tokens-ratio` must be, rounded up to a thousandth."""
        if self.window_tokens is None:
            return None
        return min(1.0, -(-1000 * self.window_tokens // self.tokens) / 1000)


def kind_of(config: Mapping[str, Any]) -> str:
    """ "deepseek_v4", "mla", "sliding" or "gqa"."""
    if "compress_ratios" in config or "compress_rates" in config:
        return "deepseek_v4"
    if config.get("kv_lora_rank"):
        return "mla"
    if (config.get("sliding_window") or config.get("attention_chunk_size")) and _SLIDING & set(
        config.get("layer_types") or ()
    ):
        return "sliding"
    return "gqa"


def sglang_cache(config: Mapping[str, Any], context: int, chunk: int, requests: int) -> KvCache:
    """The pools of SGLang for one request of `context` tokens, or several that share them.

    Args:
        config: the language model's part of `config.json`, with `layer_types` where layers differ
            (see `loaders.model_config`).
        chunk: tokens that are prefilled at once.
        requests: requests that run at the same time; each keeps a window of its own.

    Raises:
        ValueError: the configuration lacks a size.
    """
    tokens = round_up(context, PAGE)
    full, kind = _full_layers(config), kind_of(config)
    if kind == "mla":
        return KvCache((CacheRow("MLA", full, tokens, _mla_entry(config)),), tokens)
    if kind == "gqa":
        return KvCache((_gqa_row(config, "attention", full, tokens),), tokens)
    window = _window(config)
    # every request keeps its window and a page at either end; two chunks may be under way
    held = min(tokens, round_up(requests * (window + 2 * PAGE) + 2 * chunk + PAGE, PAGE))
    if kind == "sliding":
        rows = (
            _gqa_row(config, "full attention", full, tokens),
            _gqa_row(config, "sliding attention", _sliding_layers(config), held),
        )
        return KvCache(rows, tokens, held)
    return KvCache(_v4_pools(config, tokens, held, requests), tokens, held)


def transformers_cache(config: Mapping[str, Any], context: int) -> KvCache:
    """The cache that Transformers (5.23) keeps for one request of `context` tokens, in BF16.

    Raises:
        ValueError: the configuration lacks a size.
    """
    full, kind = _full_layers(config), kind_of(config)
    if kind == "mla":
        return KvCache((CacheRow("MLA", full, context, _mla_entry(config)),), context)
    if kind == "gqa":
        return KvCache((_gqa_row(config, "attention", full, context),), context)
    held = min(context, _window(config))
    if kind == "sliding":
        rows = (
            _gqa_row(config, "full attention", full, context),
            _gqa_row(config, "sliding attention", _sliding_layers(config), held),
        )
        return KvCache(rows, context)
    layers = _number(config, "num_hidden_layers")
    ratios, entry = _v4_ratios(config), _BF16 * _number(config, "head_dim")
    index = _BF16 * _number(config, "index_head_dim")
    compressed = (
        CacheRow("window", layers, held, entry),
        CacheRow("1 of 4 and its index", ratios.count(4), context // 4, entry + index),
        CacheRow("1 of 128", ratios.count(128), context // 128, entry),
        # keys and gates of what is not yet compressed, twice as wide where windows overlap
        CacheRow("state, 1 of 4", ratios.count(4), 8, 4 * (entry + index)),
        CacheRow("state, 1 of 128", ratios.count(128), 128, 2 * entry),
    )
    return KvCache(compressed, context)


def _gqa_row(config: Mapping[str, Any], what: str, layers: int, tokens: int) -> CacheRow:
    """2 (key, value) x KV heads x head size x 2 bytes."""
    heads = int(config.get("num_key_value_heads") or _number(config, "num_attention_heads"))
    size = config.get("head_dim")
    if not size:
        size = _number(config, "hidden_size") // _number(config, "num_attention_heads")
    return CacheRow(what, layers, tokens, 2 * _BF16 * heads * int(size), heads)


def _mla_entry(config: Mapping[str, Any]) -> int:
    """One latent and the rotary part, and DeepSeek-V3.2's FP8 index with its scale."""
    rope = _number(config, "qk_rope_head_dim", least=0)  # 0 where positions are not rotated
    latent = _number(config, "kv_lora_rank") + rope
    index = config.get("index_head_dim") or 0
    return _BF16 * latent + (int(index) + 4 if index else 0)


def _v4_pools(
    config: Mapping[str, Any], tokens: int, held: int, requests: int
) -> tuple[CacheRow, ...]:
    """FP8 latent with BF16 rotary part and scales; an FP8 index for layers that keep 1 of 4; the
    unfinished compressions (rings of 8 and 128 entries of keys and gates, float32)."""
    size, index = _number(config, "head_dim"), _number(config, "index_head_dim")
    rope = config.get("qk_rope_head_dim") or size * config.get("partial_rotary_factor", 0.125)
    entry = size + int(rope) + 8
    ratios = _v4_ratios(config)
    rings = round_up(128 * (requests + 2) + 1, 128)
    return (
        CacheRow("window", len(ratios), held, entry),
        CacheRow("1 of 4 and its index", ratios.count(4), tokens // 4, entry + index + 4),
        CacheRow("1 of 128", ratios.count(128), tokens // 128, entry),
        CacheRow("state, 1 of 4", ratios.count(4), held, 8 / PAGE * 4 * (size + index) * _F32),
        CacheRow("state, 1 of 128", ratios.count(128), rings, 2 * size * _F32),
    )


def _v4_ratios(config: Mapping[str, Any]) -> list[int]:
    """Tokens that each layer compresses into one entry; 0 for a sliding window alone."""
    layers = _number(config, "num_hidden_layers")
    given = config.get("compress_ratios")
    if isinstance(given, list):
        return given[:layers]
    types = config.get("layer_types")
    if not isinstance(types, list) or not set(types) <= set(_V4_RATIOS):
        raise ValueError("config.json lacks compress_ratios: the KV cache cannot be sized")
    return [_V4_RATIOS[name] for name in types[:layers]]


def _types(config: Mapping[str, Any]) -> list[str]:
    """Types of the layers; empty where all are alike."""
    return list(config.get("layer_types") or ())[: _number(config, "num_hidden_layers")]


def _sliding_layers(config: Mapping[str, Any]) -> int:
    """Layers that keep a window."""
    return sum(name in _SLIDING for name in _types(config))


def _full_layers(config: Mapping[str, Any]) -> int:
    """Layers whose cache grows with the context."""
    others = sum(name in _NO_CACHE for name in _types(config))
    if kind_of(config) == "sliding":
        others += _sliding_layers(config)
    return _number(config, "num_hidden_layers") - others


def keys_seen(config: Mapping[str, Any], tokens: int) -> int:
    """Keys that the last of `tokens` tokens looks at, over all layers."""
    if kind_of(config) != "sliding":
        return _full_layers(config) * tokens
    windows = _sliding_layers(config) * min(tokens, _window(config))
    return _full_layers(config) * tokens + windows


def _window(config: Mapping[str, Any]) -> int:
    """Tokens that a layer with a window keeps."""
    name = "sliding_window" if config.get("sliding_window") else "attention_chunk_size"
    return _number(config, name)


def _number(config: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"config.json lacks {name}: the KV cache cannot be sized")
    return value
