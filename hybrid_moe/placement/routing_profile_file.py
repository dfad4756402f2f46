"""A routing profile as a file of JSON, and back, checked.

    {
      "format": "hybrid_moe.routing_profile", "version": 1, "source": "emma.txt",
      "model": {"model_type": "qwen3_moe", "hidden_size": 256, "num_experts": 16, "top_k": 4,
                "layers": [0, 1, 2, 3]},
      "prefill": {"tokens": 4096, "counts": [[...], ...]},
      "decode": {"tokens": 512, "counts": [[...], ...]},
      "pairs": [{"kept": 1.0, "experts": PACKED [M, 2], "tokens": PACKED [M]}, ...],
      "windows": {"tokens": [...], "counts": PACKED [W, L, E]}
    }

Counts are plain, a layer a line, for people and other programs. The rest is packed
(`packed_array`). A layer keeps its `MAX_PAIRS` most frequent pairs: all of them up to 64 experts.
A phase without tokens, `pairs` and `windows` may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.placement.packed_array import packed, unpacked
from hybrid_moe.placement.routing_profile import (
    MAX_WINDOWS,
    PHASES,
    Counts,
    RoutedModel,
    RoutingProfile,
)

FORMAT = "hybrid_moe.routing_profile"
VERSION = 1

MAX_PAIRS = 2048
"""Pairs of experts that a layer keeps in a file: 64 experts have 2,016."""

MAX_EXPERTS = 65536
MAX_LAYERS = 1000
"""No model has more; a file that claims so is damaged, and nothing is allocated for it."""


def is_routing_profile(data: Any) -> bool:
    """Whether parsed JSON says that it is a routing profile: not a placement, say."""
    return isinstance(data, Mapping) and data.get("format") == FORMAT


def write_routing_profile(path: str | os.PathLike[str], profile: RoutingProfile) -> None:
    """Write a profile; a file of that name is replaced at once, never left half written."""
    target = Path(path).expanduser()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(to_json(profile), encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_routing_profile(path: str | os.PathLike[str]) -> RoutingProfile:
    """The profile in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, another kind of file, a newer version, or damaged; the message names
            the file and the place.
    """
    file = Path(path).expanduser()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return of_json(data, str(file))


def to_json(profile: RoutingProfile) -> str:
    """The file's text."""
    model = profile.model
    described = {
        "model_type": model.model_type,
        "hidden_size": model.hidden_size,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "layers": list(model.layers),
    }
    parts = {
        "format": json.dumps(FORMAT),
        "version": json.dumps(VERSION),
        "source": json.dumps(profile.source),
        "model": json.dumps(described),
    }
    for phase, tokens, counts in zip(PHASES, profile.tokens, profile.by_phase, strict=True):
        if tokens or counts.any():
            rows = ",\n    ".join(json.dumps(row) for row in counts.tolist())
            parts[phase] = f'{{"tokens": {tokens}, "counts": [\n    {rows}]}}'
    if profile.pairs is not None:
        pairs = zip(profile.pairs, profile.pairs_kept, strict=True)
        layers = ",\n    ".join(json.dumps(_pairs_of_layer(*layer)) for layer in pairs)
        parts["pairs"] = f"[\n    {layers}]"
    if len(profile.window_tokens):
        windows = {"tokens": profile.window_tokens.tolist(), "counts": packed(profile.windows)}
        parts["windows"] = json.dumps(windows)
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {v}" for k, v in parts.items()) + "\n}\n"


def _pairs_of_layer(pairs: Counts, kept: float) -> dict[str, Any]:
    """The most frequent pairs e < f; of equally frequent ones the lower ids."""
    first, second = np.triu_indices(len(pairs), 1)
    tokens = pairs[first, second]
    order = np.argsort(-tokens, kind="stable")[:MAX_PAIRS]
    order = np.sort(order[tokens[order] > 0])
    share = tokens[order].sum() / max(tokens.sum(), 1) if tokens.any() else 1.0
    return {
        "kept": round(float(share * kept), 6),
        "experts": packed(np.stack([first[order], second[order]], 1)),
        "tokens": packed(tokens[order]),
    }


def of_json(data: Any, where: str) -> RoutingProfile:
    """A profile from parsed JSON; `where` is what messages call it."""
    if not is_routing_profile(data):
        raise ValueError(
            f'{where} is no routing profile: it must say "format": "{FORMAT}". They are written '
            "by: hybrid-moe profile --model DIR --data FILE --out profile.json"
        )
    if data.get("version") != VERSION:
        raise ValueError(
            f"{where} has version {data.get('version')!r} of its form, this release reads "
            f"{VERSION}: measure again, or use the release that wrote it"
        )
    model = _model(data.get("model"), where)
    L, E = len(model.layers), model.num_experts
    by_phase = np.zeros((len(PHASES), L, E), np.int64)
    tokens = np.zeros(len(PHASES), np.int64)
    for at, phase in enumerate(PHASES):
        if phase in data:
            part = _table(data[phase], f"{where}: {phase}")
            tokens[at] = _count(part.get("tokens"), f"{where}: {phase}.tokens")
            by_phase[at] = _rows(part.get("counts"), (L, E), f"{where}: {phase}.counts")
    pairs, kept = _pairs(data["pairs"], L, E, where) if "pairs" in data else (None, np.zeros(0))
    windows, window_tokens = _windows(data.get("windows"), L, E, where)
    source = data.get("source", "")
    if not isinstance(source, str):
        raise ValueError(f"{where}: source must be a text")
    return RoutingProfile(model, by_phase, tokens, pairs, kept, windows, window_tokens, source)


def _model(given: Any, where: str) -> RoutedModel:
    part = _table(given, f"{where}: model")
    name = part.get("model_type")
    if not isinstance(name, str):
        raise ValueError(f"{where}: model.model_type must be a text")
    layers = part.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise ValueError(f"{where}: model.layers must be a list of 1 to {MAX_LAYERS} indices")
    for layer in layers:
        _count(layer, f"{where}: model.layers", MAX_LAYERS)
    if sorted(set(layers)) != layers:
        raise ValueError(f"{where}: model.layers must ascend")
    E = _count(part.get("num_experts"), f"{where}: model.num_experts", MAX_EXPERTS, 1)
    return RoutedModel(
        name,
        _count(part.get("hidden_size"), f"{where}: model.hidden_size"),
        E,
        _count(part.get("top_k"), f"{where}: model.top_k", E, 1),
        tuple(layers),
    )


def _pairs(given: Any, L: int, E: int, where: str) -> tuple[Counts, npt.NDArray[np.float64]]:
    if not isinstance(given, list) or len(given) != L:
        raise ValueError(f"{where}: pairs must be a list of {L} layers")
    pairs, kept = np.zeros((L, E, E), np.int64), np.zeros(L)
    for at, entry in enumerate(given):
        what = f"{where}: pairs[{at}]"
        part = _table(entry, what)
        share = part.get("kept")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{what}.kept is {share!r}, must be a share between 0 and 1")
        shape = part.get("experts", {}).get("shape") if isinstance(part.get("experts"), dict) else 0
        count = shape[0] if isinstance(shape, list) and shape else None
        count = _count(count, f"{what}.experts.shape", MAX_PAIRS)
        experts = unpacked(part.get("experts"), (count, 2), f"{what}.experts")
        tokens = unpacked(part.get("tokens"), (count,), f"{what}.tokens")
        first, second = experts.T
        if count and (second.max() >= E or (first >= second).any()):
            raise ValueError(f"{what}.experts must be pairs of ascending ids below {E}")
        pairs[at, first, second] = pairs[at, second, first] = tokens
        kept[at] = share
    return pairs, kept


def _windows(given: Any, L: int, E: int, where: str) -> tuple[Counts, Counts]:
    if given is None:
        return np.zeros((0, L, E), np.int64), np.zeros(0, np.int64)
    part = _table(given, f"{where}: windows")
    tokens = part.get("tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_WINDOWS:
        raise ValueError(f"{where}: windows.tokens must be a list of 1 to {MAX_WINDOWS} counts")
    counted = [_count(value, f"{where}: windows.tokens") for value in tokens]
    counts = unpacked(part.get("counts"), (len(tokens), L, E), f"{where}: windows.counts")
    return counts, np.array(counted, np.int64)


def _table(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a table, not {type(given).__name__}")
    return given


def _count(given: Any, what: str, most: int = (1 << 53) - 1, least: int = 0) -> int:
    if type(given) is not int or not least <= given <= most:
        raise ValueError(f"{what} has {given!r}, must be an integer from {least} to {most}")
    return given


def _rows(given: Any, shape: tuple[int, int], what: str) -> Counts:
    L, E = shape
    if not isinstance(given, list) or len(given) != L:
        raise ValueError(f"{what} must be a list of {L} layers")
    for layer, row in enumerate(given):
        if not isinstance(row, list) or len(row) != E:
            raise ValueError(f"{what}[{layer}] must be a list of {E} counts")
        for value in row:
            _count(value, f"{what}[{layer}]")
    return np.array(given, np.int64)
