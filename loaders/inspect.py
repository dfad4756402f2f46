"""What is in a checkpoint, from its headers and its configuration alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_moe.formats.table import AS_STORED, METHODS, methods_for
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.drafts import DRAFT
from hybrid_moe.loaders.expert_source import ExpertSource, held_formats
from hybrid_moe.loaders.model_config import TOP_K

EXPERTS = "routed experts"

_PARTS: tuple[tuple[str, str], ...] = (
    ("vision and audio", r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector)\."),
    ("shared experts", r"shared_expert"),
    (
        "router",
        r"\.(mlp|ffn|block_sparse_moe|moe)\.(gate|router)\b"
        r"|e_score_correction_bias|tid2eid|expert_bias",
    ),
    ("norms", r"norm"),
    ("hyper-connections", r"\bhc_|_hc\."),
    ("attention", r"attn|attention"),
    ("embeddings", r"embed|lm_head|^head\.|(^|\.)wte\."),
    ("dense MLP", r"\.(mlp|ffn|feed_forward)\."),
)
"""Parts of a model by a pattern in the key: the first that matches. Routed experts are known by
their naming scheme, draft layers by `drafts`; what matches nothing is "other"."""


@dataclass(frozen=True)
class CheckpointSummary:
    """What `inspect_checkpoint` found. Sizes are in bytes.

    Attributes:
        path: what was inspected.
        model_type: family that `config.json` names, None without one.
        architectures: classes that `config.json` names.
        scheme: naming scheme of the experts; None without experts.
        moe_layers: numbers of the layers with routed experts, dense layers counted.
        draft_layers: numbers of the draft layers that lie behind the model's own.
        num_layers: layers in all, of `config.json`.
        num_experts: routed experts of a layer.
        experts_per_token: experts that a token uses, of `config.json`; one number for each layer
            with experts where they differ.
        hidden, intermediate: hidden size, and intermediate size of an expert.
        formats: format of the experts -> layers that are stored so.
        dtypes: safetensors dtype -> bytes of all tensors of that dtype.
        parts: part of the model -> bytes, largest first.
        num_tensors, num_shards: how many.
        total_bytes: bytes of all tensors.
        ram_experts: method -> bytes of memory for all routed experts on the CPU; "STORED" where
            layers differ in format and each keeps its own.
        ram_rest: bytes of everything else but draft layers, which do not run.
        problems: what keeps the model from being loaded; empty for a good checkpoint.
    """

    path: str
    model_type: str | None
    architectures: tuple[str, ...]
    scheme: str | None
    moe_layers: tuple[int, ...]
    draft_layers: tuple[int, ...]
    num_layers: int | None
    num_experts: int | None
    experts_per_token: int | tuple[int, ...] | None
    hidden: int | None
    intermediate: int | None
    formats: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, int]
    parts: Mapping[str, int]
    num_tensors: int
    num_shards: int
    total_bytes: int
    ram_experts: Mapping[str, int]
    ram_rest: int
    problems: tuple[str, ...]


def part_of(checkpoint: Checkpoint, key: str) -> str:
    """The part of the model that a tensor belongs to."""
    if key in checkpoint.expert_keys:
        return EXPERTS
    if checkpoint.drafts.owns(key):
        return DRAFT
    return next((part for part, pattern in _PARTS if re.search(pattern, key)), "other")


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointSummary:
    """Summarize the checkpoint at `path` (a directory or a safetensors file).

    A layer that cannot be loaded is listed under `problems`; what can be said of the rest is said.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: the files cannot be read as a checkpoint at all.
    """
    checkpoint = Checkpoint.open(path, require_complete=False)
    layers: list[ExpertSource] = []
    problems = list(checkpoint.missing_layers)
    for number in checkpoint.layers:
        try:
            layer: ExpertSource = checkpoint.layer(number)
            layer.check_layout()
            layers.append(layer)
        except CheckpointError as error:
            problems.append(str(error))
    routing = checkpoint.routing_problem(layers)
    problems += [] if routing is None else [routing]
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for key, tensor in checkpoint.index.tensors.items():
        parts[part_of(checkpoint, key)] += tensor.nbytes
        dtypes[tensor.dtype] += tensor.nbytes
    formats: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        name = layer.formats.name
        formats[name] = (*formats.get(name, ()), layer.layer)
    first = layers[0] if layers else None
    total = dtypes.total()
    config = checkpoint.model
    return CheckpointSummary(
        path=str(checkpoint.index.path),
        model_type=next(iter(_strings(checkpoint.config.get("model_type"))), None),
        architectures=_strings(checkpoint.config.get("architectures")),
        scheme=checkpoint.keys_of(checkpoint.layers[0]).scheme.name if checkpoint.layers else None,
        moe_layers=checkpoint.layers,
        draft_layers=tuple(sorted(checkpoint.drafts.numbers)),
        num_layers=config.num_layers,
        num_experts=first.num_experts if first else None,
        experts_per_token=_per_token(checkpoint),
        hidden=first.hidden if first else config.integer(("hidden_size",)),
        intermediate=first.intermediate if first else None,
        formats=formats,
        dtypes=dict(dtypes.most_common()),
        parts=dict(parts.most_common()),
        num_tensors=len(checkpoint.index.tensors),
        num_shards=len({tensor.file for tensor in checkpoint.index.tensors.values()}),
        total_bytes=total,
        ram_experts=_ram(layers),
        ram_rest=total - parts[EXPERTS] - parts[DRAFT],
        problems=tuple(problems),
    )


def _ram(layers: list[ExpertSource]) -> dict[str, int]:
    """Bytes of the packed experts by method, for the methods that can load every layer."""
    ram = {}
    for name in methods_for([layer.formats for layer in layers]) if layers else ():
        try:
            held = [held_formats(layer, METHODS[name]) for layer in layers]
        except ValueError:
            continue  # rows are no whole groups of what it makes
        ram[name] = sum(s.nbytes_as(f) for s, f in zip(layers, held, strict=True))
    if len({layer.formats for layer in layers}) > 1:
        ram[AS_STORED] = sum(layer.nbytes_as(layer.formats) for layer in layers)
    return ram


def _strings(value: object) -> tuple[str, ...]:
    """A string, or the strings in a list; nothing of other values that a file may hold."""
    given = value if isinstance(value, list) else [value]
    return tuple(item for item in given if isinstance(item, str))


def _per_token(checkpoint: Checkpoint) -> int | tuple[int, ...] | None:
    """Experts of a token: one number, or one for each layer with experts where they differ."""
    counts = [checkpoint.model.of_layer(TOP_K, layer) for layer in checkpoint.layers]
    known = tuple(count for count in counts if count is not None)
    if not known or len(known) < len(counts):
        return checkpoint.model.integer(TOP_K)
    return known if len(set(known)) > 1 else known[0]
