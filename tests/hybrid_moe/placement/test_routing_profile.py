"""Routing profiles: counting, files, and what is wrong with a file."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.placement import routing_profile_file as file
from hybrid_moe.placement.packed_array import packed, unpacked
from hybrid_moe.placement.routing_profile import (
    MAX_WINDOWS,
    PHASES,
    RoutedModel,
    RoutingProfile,
    merged_windows,
    together,
)
from hybrid_moe.placement.routing_profile_file import (
    of_json,
    read_routing_profile,
    to_json,
    write_routing_profile,
)
from hybrid_moe.placement.routing_recorder import RoutingRecorder

MODEL = RoutedModel("qwen3_moe", 256, 6, 2, (1, 3))

Steps = list[tuple[str, list[list[list[int]]]]]
"""(phase, ids of each token in each layer [L][T][k]) of each step."""


@st.composite
def steps(draw: st.DrawFn, most: int = 6) -> Steps:
    """Ids that are distinct for a token, as a router chooses them, and -1 for padding."""
    made: Steps = []
    for _ in range(draw(st.integers(0, most))):
        tokens = draw(st.integers(0, 5))
        token = st.one_of(
            st.permutations(range(MODEL.num_experts)).map(lambda ids: ids[: MODEL.top_k]),
            st.just([-1] * MODEL.top_k),
        )
        layers = [draw(st.lists(token, min_size=tokens, max_size=tokens)) for _ in MODEL.layers]
        made.append((draw(st.sampled_from(PHASES)), layers))
    return made


def record(given: Steps, recorder: RoutingRecorder | None = None) -> RoutingRecorder:
    recorder = recorder or RoutingRecorder(MODEL)
    for phase, layers in given:
        recorder.set_phase(phase)
        for layer, ids in zip(MODEL.layers, layers, strict=True):
            recorder.add(layer, torch.tensor(ids, dtype=torch.int32).reshape(-1, MODEL.top_k))
        recorder.mark()
    return recorder


@given(steps())
@settings(deadline=None, max_examples=60)
def test_what_is_counted(given: Steps) -> None:
    """Beside counting one token after another in Python."""
    profile = record(given).profile("words")
    used: Counter[tuple[str, int, int]] = Counter()
    both: Counter[tuple[int, int, int]] = Counter()
    tokens: Counter[tuple[str, int]] = Counter()
    for phase, layers in given:
        for at, layer in enumerate(layers):
            for ids in layer:
                tokens[phase, at] += ids[0] >= 0
                used.update((phase, at, e) for e in ids if e >= 0)
                both.update((at, e, f) for e, f in itertools.permutations(ids, 2) if e >= 0)
    for p, phase in enumerate(PHASES):
        most = max(tokens[phase, at] for at in range(len(MODEL.layers)))
        assert profile.tokens[p] == most
        for at, e in np.ndindex(profile.shape):
            assert profile.by_phase[p, at, e] == used[phase, at, e]
    assert profile.pairs is not None and profile.pairs_kept.tolist() == [1.0, 1.0]
    for at, e, f in np.ndindex(profile.pairs.shape):
        assert profile.pairs[at, e, f] == both[at, e, f]
    np.testing.assert_array_equal(profile.windows.sum(0), profile.counts)
    assert profile.window_tokens.sum() == profile.tokens.sum()


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_few_and_many_tokens_of_many_experts(tokens: int) -> None:
    """Pairs of few tokens are added one by one, those of many by a product of matrices."""
    E, k = 64, 4
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(tokens)])
    ids[0, 1] = -1
    recorder = RoutingRecorder(RoutedModel("", 0, E, k, (0,)))
    recorder.add(0, ids)
    recorder.add(0, ids)
    profile = recorder.profile()
    assert profile.pairs is not None
    expected = np.zeros((E, E), np.int64)
    for token in ids.tolist():
        for e, f in itertools.permutations([e for e in token if e >= 0], 2):
            expected[e, f] += 2
    np.testing.assert_array_equal(profile.pairs[0], expected)


def test_windows_are_in_the_order_of_time_and_few() -> None:
    recorder = RoutingRecorder(MODEL, window_tokens=8)
    for step in range(3 * MAX_WINDOWS):
        record([("decode", [[[step % 6, (step + 1) % 6]]] * 2)], recorder)
    profile = recorder.profile()
    assert len(profile.window_tokens) <= MAX_WINDOWS
    assert recorder.window_tokens > 8
    assert profile.window_tokens.sum() == 3 * MAX_WINDOWS
    # each window has the experts of its own steps
    step = 0
    for tokens, counts in zip(profile.window_tokens, profile.windows, strict=True):
        seen = Counter(e % 6 for s in range(step, step + tokens) for e in (s, s + 1))
        assert counts[0].tolist() == [seen[e] for e in range(6)]
        step += int(tokens)


def test_merging_windows_keeps_their_sum() -> None:
    windows, tokens = np.arange(5 * 2 * 3).reshape(5, 2, 3), np.arange(1, 6)
    merged, counted = merged_windows(windows, tokens, 3)
    assert counted.tolist() == [3, 7, 5]
    np.testing.assert_array_equal(merged, [windows[:2].sum(0), windows[2:4].sum(0), windows[4]])


def test_a_recorder_that_begins_again() -> None:
    recorder = record([("prefill", [[[0, 1]], [[2, 3]]])])
    recorder.reset()
    assert recorder.profile().tokens.sum() == 0
    record([("decode", [[[4, 5]], [[4, 5]]])], recorder)
    assert recorder.profile().decode[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert recorder.profile().prefill.sum() == 0


def test_a_layer_that_the_model_has_not() -> None:
    with pytest.raises(ValueError, match=r"layer 2 is not among the model's: \(1, 3\)"):
        RoutingRecorder(MODEL).add(2, torch.zeros(1, 2, dtype=torch.int64))


def test_shares() -> None:
    profile = record([("decode", [[[0, 1], [0, 2]], [[-1, -1]] * 2])]).profile()
    assert profile.shares("decode")[0].tolist() == [0.5, 0.25, 0.25, 0, 0, 0]
    assert profile.use()[0].tolist() == [1, 0.5, 0.5, 0, 0, 0]
    np.testing.assert_allclose(profile.shares()[1], 1 / 6)  # nothing is known of it
    np.testing.assert_allclose(profile.shares("prefill"), 1 / 6)


# Several profiles -------------------------------------------------------------------------------


@given(steps(), steps())
@settings(deadline=None, max_examples=30)
def test_together_is_one_after_the_other(first: Steps, second: Steps) -> None:
    both = together([record(first).profile("a"), record(second).profile("b")])
    expected = record([*first, *second]).profile()
    np.testing.assert_array_equal(both.by_phase, expected.by_phase)
    assert both.pairs is not None and expected.pairs is not None
    np.testing.assert_array_equal(both.pairs, expected.pairs)
    np.testing.assert_allclose(both.pairs_kept, 1)
    assert both.source == "a; b"


def test_together_needs_one_model() -> None:
    other = RoutedModel("qwen3_moe", 256, 6, 2, (1, 2))
    zeros = np.zeros((3, 2, 6), np.int64), np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="measured on another model: its layers"):
        together([RoutingProfile(MODEL, *zeros), RoutingProfile(other, *zeros)])
    with pytest.raises(ValueError, match="no profile is given"):
        together([])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (RoutedModel("another_name", 256, 6, 2, (1, 3)), None),
        (RoutedModel("", 0, 6, 2, (1, 3)), None),
        (RoutedModel("qwen3_moe", 512, 6, 2, (1, 3)), "hidden_size is 256, not 512"),
        (RoutedModel("qwen3_moe", 256, 8, 2, (1, 3)), "num_experts is 6, not 8"),
        (RoutedModel("qwen3_moe", 256, 6, 4, (1, 3)), "top_k is 2, not 4"),
        (RoutedModel("qwen3_moe", 256, 6, 2, (0, 1, 2)), "2 layers from 1 to 3, not 3 layers from"),
    ],
)
def test_checked_against_the_model(other: RoutedModel, said: str | None) -> None:
    profile = record([]).profile()
    if said is None:
        profile.check(other, "p.json")
        return
    with pytest.raises(ValueError, match=r"p\.json was measured on another model") as raised:
        profile.check(other, "p.json")
    assert said in str(raised.value)


def test_arrays_must_fit() -> None:
    counts, tokens = np.zeros((3, 2, 6), np.int64), np.zeros(3, np.int64)
    with pytest.raises(ValueError, match=r"by_phase has shape \[3, 2, 5\], must be \[3, 2, 6\]"):
        RoutingProfile(MODEL, counts[:, :, :5], tokens)
    with pytest.raises(ValueError, match="tokens has -1"):
        RoutingProfile(MODEL, counts, tokens - 1)
    with pytest.raises(ValueError, match=r"windows has shape \[1, 2, 6\], must be \[0, 2, 6\]"):
        RoutingProfile(MODEL, counts, tokens, windows=counts[:1])


# Files ------------------------------------------------------------------------------------------


@given(steps())
@settings(deadline=None, max_examples=30)
def test_a_file_brings_everything_back(
    tmp_path_factory: pytest.TempPathFactory, given: Steps
) -> None:
    path = tmp_path_factory.mktemp("profile") / "p.json"
    profile = record(given).profile('text "é".txt')
    write_routing_profile(path, profile)
    found = read_routing_profile(path)
    assert found.model == profile.model and found.source == profile.source
    for name in ("by_phase", "tokens", "pairs", "pairs_kept", "windows", "window_tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(profile, name), name)
    assert [entry.name for entry in path.parent.iterdir()] == ["p.json"]


def test_a_large_model_has_a_small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's sizes, random counts, which no compressor likes: below 2 MB. Pairs that find
    no room are the rare ones, and the file says how much it kept."""
    rng = np.random.default_rng(0)
    L, E = 58, 256
    pairs = np.triu(rng.poisson(rng.gamma(0.2, 300, (L, E, E))), 1)
    pairs += pairs.transpose(0, 2, 1)
    profile = RoutingProfile(
        RoutedModel("deepseek_v3", 7168, E, 8, tuple(range(3, 61))),
        rng.poisson(3000, (3, L, E)),
        np.array([90000, 6000, 0]),
        pairs,
        windows=rng.poisson(400, (MAX_WINDOWS, L, E)),
        window_tokens=np.full(MAX_WINDOWS, 6000),
    )
    text = to_json(profile)
    assert len(text) < 2e6
    found = of_json(json.loads(text), "it")
    assert found.pairs is not None
    kept = found.pairs > 0
    np.testing.assert_array_equal(found.pairs[kept], pairs[kept])
    assert kept.sum((1, 2)).tolist() == [2 * file.MAX_PAIRS] * L
    for at in range(3):
        lost = pairs[at][~kept[at]]
        assert lost.max() <= pairs[at][kept[at]].min()
        np.testing.assert_allclose(
            found.pairs_kept[at], 1 - lost.sum() / pairs[at].sum(), atol=1e-5
        )
    twice = of_json(json.loads(to_json(found)), "it")
    np.testing.assert_allclose(twice.pairs_kept, found.pairs_kept, atol=1e-5)


def damaged() -> list[tuple[Any, Any, str]]:
    """(path into the file, what is written there, what the message says)."""
    zeros = packed(np.zeros((1, 2, 6), np.int64))
    return [
        (("format",), "other", "is no routing profile"),
        (("version",), 2, "has version 2 of its form, this release reads 1"),
        (("version",), None, "has version None"),
        (("source",), 3, "source must be a text"),
        (("model",), [], "model must be a table, not list"),
        (("model", "model_type"), 1, "model.model_type must be a text"),
        (("model", "layers"), [], "model.layers must be a list of 1 to"),
        (("model", "layers"), [3, 1], "model.layers must ascend"),
        (("model", "layers"), [1, 1], "model.layers must ascend"),
        (("model", "layers"), [0, -1], "model.layers has -1"),
        (("model", "num_experts"), 1 << 40, "model.num_experts has 1099511627776"),
        (("model", "num_experts"), 5, r"counts\[0\] must be a list of 5 counts"),
        (("model", "top_k"), 0, "model.top_k has 0"),
        (("model", "top_k"), 7, "model.top_k has 7, must be an integer from 1 to 6"),
        (("model", "hidden_size"), True, "model.hidden_size has True"),
        (("decode",), 1, "decode must be a table"),
        (("decode", "tokens"), -1, "decode.tokens has -1"),
        (("decode", "counts"), [[0] * 6], "decode.counts must be a list of 2 layers"),
        (("decode", "counts", 1, 2), 1.5, r"decode.counts\[1\] has 1.5"),
        (("decode", "counts", 1, 2), 1 << 70, r"decode.counts\[1\] has"),
        (("pairs",), [{}], "pairs must be a list of 2 layers"),
        (("pairs", 0), [], r"pairs\[0\] must be a table"),
        (("pairs", 0, "kept"), 1.5, r"pairs\[0\].kept is 1.5"),
        (("pairs", 0, "kept"), float("nan"), r"pairs\[0\].kept is nan"),
        (("pairs", 0, "experts"), 0, r"pairs\[0\].experts.shape has None"),
        (("pairs", 0, "experts", "shape", 0), 1 << 40, r"pairs\[0\].experts.shape has"),
        (("pairs", 0, "experts"), packed(np.array([[1, 1]])), "pairs of ascending ids below 6"),
        (("pairs", 0, "experts"), packed(np.array([[1, 6]])), "pairs of ascending ids below 6"),
        (("pairs", 0, "tokens", "zlib"), "!", r"pairs\[0\].tokens is damaged"),
        (("pairs", 0, "tokens", "bits"), 7, r"pairs\[0\].tokens must have bits of 8, 16, 32, 64"),
        (("pairs", 0, "tokens", "bits"), True, r"pairs\[0\].tokens must have bits"),
        (("pairs", 0, "tokens", "bits"), 64, "damaged: it does not have"),
        (("windows",), 3, "windows must be a table"),
        (("windows", "tokens"), [], "windows.tokens must be a list of 1 to 16 counts"),
        (("windows", "tokens", 0), "1", "windows.tokens has '1'"),
        (("windows", "counts"), zeros, r"windows.counts has shape \[1, 2, 6\], must be"),
        (("windows", "counts", "zlib"), zeros["zlib"], "windows.counts is damaged"),
    ]  # fmt: skip


@pytest.mark.parametrize(("where", "value", "said"), damaged())
def test_what_is_wrong_is_named(
    tmp_path: Path, where: tuple[Any, ...], value: Any, said: str
) -> None:
    one = ("decode", [[[0, 1]], [[2, 3]]])
    data = json.loads(to_json(record([one, one]).profile()))
    part = data
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said) as raised:
        read_routing_profile(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"0": [1]}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"p\.json is (not JSON|no routing profile)"):
        read_routing_profile(path)
    with pytest.raises(FileNotFoundError):
        read_routing_profile(tmp_path / "none.json")


@given(st.lists(st.integers(0, (1 << 63) - 1), max_size=20))
def test_packed_integers(values: list[int]) -> None:
    array = np.array(values, np.int64)
    np.testing.assert_array_equal(unpacked(packed(array), array.shape, "it"), array)


def test_packed_integers_that_are_too_large() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        packed(np.array([-1]))
    given = packed(np.array([1 << 40]))
    given["zlib"] = packed(np.array([0], np.int64))["zlib"]
    with pytest.raises(ValueError, match="it is damaged"):
        unpacked(given, (1,), "it")
