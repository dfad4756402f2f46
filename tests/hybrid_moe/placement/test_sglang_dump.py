"""Dumps as SGLang 0.5.23's recorder writes them, read as profiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.placement.routing_profile import MAX_WINDOWS, PHASES, RoutedModel
from hybrid_moe.placement.sglang_dump import read_sglang_dump

MODEL = RoutedModel("deepseek_v3", 0, 6, 2, (1, 2))
LAYERS = 3
"""Of the model: the first one is dense."""


def save(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def chosen(rng: np.random.Generator, tokens: int) -> Any:
    """Physical ids [layers, tokens, 8] as `_DetailSinglePassGatherer` keeps them: -1 where a token
    has no more experts, and in dense layers."""
    ids = np.full((LAYERS, tokens, 8), -1, np.int32)
    for layer in MODEL.layers:
        for token in range(tokens):
            ids[layer, token, : MODEL.top_k] = rng.permutation(8)[: MODEL.top_k]
    return ids


def physical_counts(ids: Any) -> torch.Tensor:
    """As the recorder's `_convert_per_token_to_global_physical_count`."""
    counts = [np.bincount(row[row >= 0], minlength=8) for row in ids.reshape(LAYERS, -1)]
    return torch.from_numpy(np.array(counts).astype(np.int32))


MAP = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 3]] * LAYERS)
"""Physical -> logical: experts 0 and 3 have a replica."""


@pytest.mark.parametrize("steps", [0, 3, 100])
def test_stat(tmp_path: Path, steps: int) -> None:
    """`_StatAccumulator`: a ring of steps, the last of which have not happened."""
    rng = np.random.default_rng(steps)
    counts = np.zeros((steps + 5, LAYERS, 6), np.int32)
    tokens = rng.integers(1, 9, steps)
    for step in range(steps):
        for layer in MODEL.layers:
            for _ in range(tokens[step]):
                counts[step, layer, rng.permutation(6)[: MODEL.top_k]] += 1
    data = {"rank": 0, "logical_count": torch.from_numpy(counts),
            "average_utilization_rate_over_window": None}  # fmt: skip
    profile = read_sglang_dump(save(tmp_path / "expert_distribution.pt", data), MODEL)
    np.testing.assert_array_equal(profile.by_phase[2], counts[:, 1:].sum(0))
    assert profile.by_phase[:2].sum() == 0
    assert profile.tokens.tolist() == [0, 0, tokens.sum()]
    np.testing.assert_array_equal(profile.windows.sum(0), profile.counts)
    assert len(profile.window_tokens) == (min(steps, 13) if steps else 0) <= MAX_WINDOWS
    assert profile.pairs is None and profile.source == "expert_distribution.pt"


@pytest.mark.parametrize("replicas", [False, True])
def test_per_pass(tmp_path: Path, replicas: bool) -> None:
    rng = np.random.default_rng(1)
    ids = [chosen(rng, 4) % (8 if replicas else 6) for _ in range(3)]
    records = [
        {"forward_pass_id": n, "rank": 0, "gatherer_key": "primary",
         "global_physical_count": physical_counts(each)}
        for n, each in enumerate(ids)
    ]  # fmt: skip
    data = {"records": records, "last_physical_to_logical_map": MAP}
    profile = read_sglang_dump(save(tmp_path / "d.pt", data), MODEL)
    expected = np.zeros((2, 6), np.int64)
    for each in ids:
        for at, layer in enumerate(MODEL.layers):
            for expert in each[layer][each[layer] >= 0]:
                expected[at, int(MAP[layer, expert])] += 1
    np.testing.assert_array_equal(profile.by_phase[2], expected)
    assert profile.pairs is None and len(profile.window_tokens) == 3


def test_per_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    modes = {1: "prefill", 2: "decode", 3: "unknown"}
    records, used, both = [], Counter[Any](), Counter[Any]()
    for number, mode in enumerate((1, 2, 2, 3)):
        ids = chosen(rng, 5)
        records.append(
            {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "forward_mode": mode,
             "input_ids": [1] * 5, "positions": [0] * 5, "extend_seq_lens": None,
             "topk_ids_of_layer": torch.from_numpy(ids), "misc_objects": [],
             "global_physical_count": physical_counts(ids)}
        )  # fmt: skip
        for layer in MODEL.layers:
            for token in ids[layer]:
                logical = [int(MAP[layer, expert]) for expert in token if expert >= 0]
                used.update((modes[mode], layer, expert) for expert in logical)
                both.update((layer, *pair) for pair in {tuple(sorted(logical))})
    data = {"records": records, "last_physical_to_logical_map": MAP}
    profile = read_sglang_dump(save(tmp_path / "d.pt", data), MODEL)
    assert profile.tokens.tolist() == [5, 10, 5]
    assert profile.pairs is not None
    for at, layer in enumerate(MODEL.layers):
        for expert in range(6):
            for p, phase in enumerate(PHASES):
                assert profile.by_phase[p, at, expert] == used[phase, layer, expert]
            for other in range(expert + 1, 6):
                assert profile.pairs[at, expert, other] == both[layer, expert, other]


def stat(counts: Any) -> dict[str, Any]:
    return {"logical_count": torch.tensor(counts, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1], "is no dump of SGLang's expert distribution recorder"),
        ({"logical_count": 3}, "has neither logical_count nor records"),
        (stat([[0] * 6]), "logical_count has 2 dimensions"),
        (stat([[[0] * 6] * 2]), "another model: it has 2 layers"),
        (stat([[[2] * 5] * 3]), "another model: layers have 5 experts"),
        (stat([[[1, 0, 0, 0, 0, 0]] * 3]), "another model: a step has 1 pairs"),
        (stat([[[3, -1, 0, 0, 0, 0]] * 3]), "has -1 as a count"),
        ({"records": [{}]}, "a record has no global_physical_count"),
        (
            {"records": [{"global_physical_count": torch.zeros(3, 9, dtype=torch.int32)}]},
            "another model: a layer has expert 8",
        ),
        (
            {"records": [{"global_physical_count": torch.zeros(3, 9, dtype=torch.int32)}],
             "last_physical_to_logical_map": MAP},
            "last_physical_to_logical_map does not fit",
        ),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, data: Any, said: str) -> None:
    path = save(tmp_path / "d.pt", data)
    with pytest.raises(ValueError, match=said) as raised:
        read_sglang_dump(path, MODEL)
    assert str(path) in str(raised.value)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("a pickle was run",))


def test_a_dump_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"not a file that torch\.save wrote"):
        read_sglang_dump(save(tmp_path / "d.pt", Evil()), MODEL)
    assert capsys.readouterr().out == ""
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"not a file that torch\.save wrote"):
        read_sglang_dump(tmp_path / "text.pt", MODEL)
