"""Dumps of SGLang's expert distribution recorder as routing profiles.

SGLang records with `--expert-distribution-recorder-mode MODE` between its endpoints
`/start_expert_distribution_record` and `/stop_...`, and `/dump_expert_distribution_record` writes
files into the folder of SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.

| mode | file | what it has |
|---|---|---|
| stat, stat_approx | one | `logical_count` [steps, layers, E] |
| per_pass | one for each rank | records with `global_physical_count` [layers, P] |
| per_token | one for each rank | and with `topk_ids_of_layer` [layers, T, 8], `forward_mode` |

Only per_token tells prefill from decode, and which experts a token uses together. Ranks of tensor
parallelism see the same tokens: give the file of one of them. In the first two modes a step is a
row of a ring buffer (1,000 steps unless --expert-distribution-recorder-buffer-size says otherwise):
of a longer record the latest steps are there, and time begins somewhere within them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_moe.placement.routing_profile import (
    PHASES,
    Counts,
    RoutedModel,
    RoutingProfile,
    merged_windows,
)
from hybrid_moe.placement.routing_recorder import RoutingRecorder

FORWARD_MODES = {1: "prefill", 2: "decode"}
"""SGLang's `ForwardMode`: EXTEND and DECODE. Others mix the two, or verify a draft."""


def read_sglang_dump(path: str | os.PathLike[str], model: RoutedModel) -> RoutingProfile:
    """The profile in a dump.

    Args:
        path: the `.pt` file. It is read without running anything that a pickle could name.
        model: what SGLang served; a dump does not say.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another kind of file, or a dump of another model; the message names the file.
    """
    file = Path(path).expanduser()
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file the unpickler raises anything
        raise ValueError(f"{file} is not a file that torch.save wrote: {error}") from error
    if isinstance(data, Mapping) and isinstance(data.get("logical_count"), torch.Tensor):
        return _of_steps(data["logical_count"], model, file)
    if isinstance(data, Mapping) and isinstance(data.get("records"), list):
        return _of_records(data, model, file)
    raise ValueError(
        f"{file} is no dump of SGLang's expert distribution recorder: it has neither logical_count "
        "nor records"
    )


def _of_steps(logical: torch.Tensor, model: RoutedModel, file: Path) -> RoutingProfile:
    """Counts [steps, layers, E]."""
    if logical.dim() != 3:
        raise ValueError(f"{file}: logical_count has {logical.dim()} dimensions, must have 3")
    steps = logical[:, _rows(logical.shape[1], model, file)].numpy().astype(np.int64)
    if steps.shape[2] != model.num_experts:
        raise _other_model(file, f"layers have {steps.shape[2]} experts", model)
    return _summed(steps[steps.any((1, 2))], model, file)


def _summed(steps: Counts, model: RoutedModel, file: Path) -> RoutingProfile:
    """A profile of [steps, L, E], whose phases nobody knows."""
    if steps.size and steps.min() < 0:
        raise ValueError(f"{file} has {steps.min()} as a count")
    pairs = steps.sum(2)
    if (pairs % model.top_k).any():
        found = int(pairs[pairs % model.top_k != 0][0])
        raise _other_model(file, f"a step has {found} pairs of token and expert", model)
    tokens = pairs.max(1, initial=0) // model.top_k
    by_phase = np.zeros((len(PHASES), *steps.shape[1:]), np.int64)
    by_phase[PHASES.index("unknown")] = steps.sum(0)
    total = np.zeros(len(PHASES), np.int64)
    total[PHASES.index("unknown")] = tokens.sum()
    windows, window_tokens = merged_windows(steps, tokens)
    return RoutingProfile(
        model, by_phase, total, windows=windows, window_tokens=window_tokens, source=file.name
    )


def _of_records(data: Mapping[str, Any], model: RoutedModel, file: Path) -> RoutingProfile:
    records, mapping = data["records"], data.get("last_physical_to_logical_map")
    for record in records:
        if not isinstance(record, Mapping) or "global_physical_count" not in record:
            raise ValueError(f"{file}: a record has no global_physical_count")
    if records and all("topk_ids_of_layer" in record for record in records):
        return _of_tokens(records, mapping, model, file)
    steps = np.zeros((len(records), len(model.layers), model.num_experts), np.int64)
    for step, record in zip(steps, records, strict=True):
        counts = record["global_physical_count"]
        rows = _rows(counts.shape[0], model, file)
        for at, row in enumerate(rows):
            logical = _logical(mapping, row, counts.shape[1], model, file)
            np.add.at(step[at], logical, counts[row].numpy().astype(np.int64))
    return _summed(steps, model, file)


def _of_tokens(
    records: list[Mapping[str, Any]], mapping: Any, model: RoutedModel, file: Path
) -> RoutingProfile:
    recorder = RoutingRecorder(model)
    since_mark = 0
    for record in records:
        ids = record["topk_ids_of_layer"].to(torch.int64)
        physical = record["global_physical_count"].shape[1]
        recorder.set_phase(FORWARD_MODES.get(record.get("forward_mode", 0), "unknown"))
        for layer, row in zip(model.layers, _rows(ids.shape[0], model, file), strict=True):
            logical = torch.from_numpy(_logical(mapping, row, physical, model, file))
            of_layer = ids[row]
            if of_layer.numel() and int(of_layer.max()) >= physical:
                raise _other_model(file, f"a token has expert {int(of_layer.max())}", model)
            known = of_layer >= 0
            recorder.add(layer, torch.where(known, logical[of_layer.clamp(min=0)], -1))
        since_mark += ids.shape[1]
        if since_mark >= recorder.window_tokens:
            recorder.mark()
            since_mark = 0
    return recorder.profile(file.name)


def _rows(layers: int, model: RoutedModel, file: Path) -> list[int]:
    """The model's layers among those of a dump, which has dense ones too."""
    if layers <= model.layers[-1]:
        raise _other_model(file, f"it has {layers} layers", model)
    return list(model.layers)


def _logical(mapping: Any, row: int, physical: int, model: RoutedModel, file: Path) -> Counts:
    """[P]: the checkpoint's expert behind each physical one."""
    found: Counts = np.arange(physical)
    if isinstance(mapping, torch.Tensor):
        if mapping.dim() != 2 or row >= len(mapping) or mapping.shape[1] != physical:
            raise ValueError(f"{file}: last_physical_to_logical_map does not fit the records")
        found = mapping[row].numpy().astype(np.int64)
    if found.size and not (found.min() >= 0 and found.max() < model.num_experts):
        raise _other_model(file, f"a layer has expert {found.max()}", model)
    return found


def _other_model(file: Path, what: str, model: RoutedModel) -> ValueError:
    return ValueError(
        f"{file} was recorded with another model: {what}, but this one has {model.num_experts} "
        f"experts in layers {model.layers[0]} to {model.layers[-1]}, {model.top_k} per token"
    )
