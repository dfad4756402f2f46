"""How model families name the tensors of their routed experts, as a table.

A checkpoint's scheme is found from its keys alone: a row's pattern either matches a key or it does
not. Sources: the `conversion_mapping` of Transformers 5, which lists the names on the hub beside
those of the modules, and the published indices of DeepSeek-V4, gpt-oss, Mixtral, MiniMax-M2 and
Qwen3-MoE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from hybrid_moe.formats.tensors import CheckpointError

PREFIX = r"((?:(?:model|language_model|text_model|thinker)\.)*)"
"""What may stand before `layers.L`. Not `mtp.`: draft layers have numbers of their own."""

_LAYER = re.compile(rf"{PREFIX}layers\.(\d{{1,6}})\.")
_BLOCK = re.compile(r".*?layers\.\d{1,6}\..*?experts\.")
"""A key up to its experts, shared ones too."""


@dataclass(frozen=True)
class NamingScheme:
    """Names of one family's expert tensors within a layer.

    Per expert, a key is `{prefix}layers.L.{block}.E.{projection}{suffix}`; fused, with all experts
    along the first axis, it is `{prefix}layers.L.{block}.{projection}{suffix}`.

    Attributes:
        name: name used in messages and by `inspect`.
        block: path from the layer to its experts.
        gate, up, down: names of the projections; gate and up are equal where one tensor holds both.
        weights: suffixes that codes may have; the first is the one that is written.
        scales: suffixes that scales may have, likewise.
        bias: suffix of a bias.
        zeros, factors, orders: suffixes that zero points, factors of a whole matrix, and the groups
            of inputs may have; read where experts are not fused.
        fused: all experts are in one tensor.
        interleaved: gate rows and up rows alternate by this scheme's definition. Of other fused
            schemes the name does not tell, see `layout`.
        markers: endings that only this scheme has, for schemes that share names; one is enough.
        mxfp4_dtypes: safetensors dtypes of the codes and scales of the family's MXFP4 experts.
    """

    name: str
    block: str
    gate: str
    up: str
    down: str
    weights: tuple[str, ...] = (".weight", ".weight_packed", ".qweight")
    scales: tuple[str, ...] = (".weight_scale", ".weight_scale_inv", ".scales")
    bias: str = ".bias"
    zeros: tuple[str, ...] = (".qzeros", ".weight_zero_point")
    factors: tuple[str, ...] = (".weight_scale_2",)
    orders: tuple[str, ...] = (".g_idx", ".weight_g_idx")
    fused: bool = False
    interleaved: bool = False
    markers: tuple[str, ...] = ()
    mxfp4_dtypes: tuple[str, str] = ("U8", "U8")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a key of this scheme. Groups: prefix, layer, expert (unless fused)."""
        expert = "" if self.fused else r"(\d{1,6})\."
        projections = "|".join(dict.fromkeys((self.gate, self.up, self.down)))
        suffixes = "|".join(map(re.escape, (*self.weights, *self.scales, self.bias)))
        # Any suffix of a per-expert name counts: an expert whose tensors have foreign names is
        # reported, not overlooked.
        suffix = f"(?:{suffixes})" if self.fused else r"\.\w+"
        return re.compile(
            rf"{PREFIX}layers\.(\d{{1,6}})\.{re.escape(self.block)}\.{expert}(?:{projections}){suffix}"
        )

    def stem(self, prefix: str, layer: int, expert: int) -> str:
        """The key up to the projection; the same for all experts where they are fused."""
        stem = f"{prefix}layers.{layer}.{self.block}."
        return stem if self.fused else f"{stem}{expert}."


PER_EXPERT = NamingScheme(
    "per-expert (Qwen3-MoE, DeepSeek-V3)",
    "mlp.experts", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
DEEPSEEK_V4 = NamingScheme(
    "DeepSeek-V4",
    "ffn.experts", "w1", "w3", "w2",
    scales=(".scale", ".weight_scale", ".weight_scale_inv", ".scales"),
    mxfp4_dtypes=("I8", "F8_E8M0"),
)  # fmt: skip
MIXTRAL = NamingScheme(
    "Mixtral, MiniMax",
    "block_sparse_moe.experts", "w1", "w3", "w2",
)  # fmt: skip
MISTRAL = NamingScheme("Mistral", "experts", "w1", "w3", "w2")
GPT_OSS_MXFP4 = NamingScheme(
    "gpt-oss MXFP4",
    "mlp.experts", "gate_up_proj", "gate_up_proj", "down_proj",
    weights=("_blocks",), scales=("_scales",), bias="_bias",
    fused=True, interleaved=True,
    markers=("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"),
)  # fmt: skip
FUSED = NamingScheme(
    "fused (Transformers)",
    "mlp.experts", "gate_up_proj", "gate_up_proj", "down_proj",
    weights=("",), scales=("_scale_inv", "_scale"), bias="_bias",
    fused=True,
)  # fmt: skip

SCHEMES: tuple[NamingScheme, ...] = (
    PER_EXPERT,
    DEEPSEEK_V4,
    MIXTRAL,
    MISTRAL,
    GPT_OSS_MXFP4,
    FUSED,
)
"""Every scheme. Of the fused ones a layer has the first of which it shows a marker."""


def layer_of(key: str) -> int | None:
    """The layer of the language model that a tensor belongs to, if any."""
    match = _LAYER.match(key)
    return None if match is None else int(match[2])


@dataclass
class LayerKeys:
    """What the keys say about the experts of one layer.

    Attributes:
        layer: number of the layer, dense layers counted.
        prefix: what stands before `layers.`.
        scheme: the naming scheme.
        experts: ids that appear in per-expert names; empty where experts are fused.
        keys: every key of the layer's experts.
        foreign: keys beside them that the scheme does not explain.
    """

    layer: int
    prefix: str
    scheme: NamingScheme
    experts: set[int] = field(default_factory=set)
    keys: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def find_layers(keys: Iterable[str]) -> dict[int, LayerKeys]:
    """The layers that have routed experts, by number, ascending.

    Raises:
        CheckpointError: one layer's experts appear under two names.
    """
    found: dict[tuple[int, str, str], LayerKeys] = {}
    unmatched: list[str] = []
    likely = SCHEMES[0]
    for key in keys:
        if "experts." not in key:
            continue
        match = likely.pattern.fullmatch(key)  # neighbours mostly share their scheme
        if match is None:
            matches = ((scheme, scheme.pattern.fullmatch(key)) for scheme in SCHEMES)
            likely, match = next((pair for pair in matches if pair[1]), (likely, None))
        if match is None:
            unmatched.append(key)
            continue
        prefix, layer = match[1], int(match[2])
        # fused schemes share names; which of them it is needs the whole layer's keys
        name = f"{likely.block} {'fused' if likely.fused else likely.gate}"
        entry = found.setdefault((layer, prefix, name), LayerKeys(layer, prefix, likely))
        entry.keys.append(key)
        if not likely.fused:
            entry.experts.add(int(match[3]))
    layers: dict[int, LayerKeys] = {}
    for (layer, *_), entry in sorted(found.items(), key=lambda item: item[0][0]):
        if layer in layers:
            raise CheckpointError(
                f"layer {layer} has experts under two names: {layers[layer].keys[0]} "
                f"and {entry.keys[0]}"
            )
        if entry.scheme.fused:
            entry.scheme = _fused_scheme(entry)
        layers[layer] = entry
    blocks = {f"{e.prefix}layers.{e.layer}.{e.scheme.block}.": e for e in layers.values()}
    for key in unmatched:
        beside = _BLOCK.match(key)
        if beside and beside[0] in blocks:
            blocks[beside[0]].foreign.append(key)
    return layers


def _fused_scheme(entry: LayerKeys) -> NamingScheme:
    stem = entry.scheme.stem(entry.prefix, entry.layer, 0)
    endings = {key.removeprefix(stem) for key in entry.keys}
    return next(s for s in SCHEMES if s.fused and (not s.markers or endings & set(s.markers)))
