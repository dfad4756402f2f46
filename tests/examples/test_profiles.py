"""The routing profiles of the small model that are in the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hybrid_moe
from hybrid_moe.integrations.transformers.routing_hooks import recorded_routing
from hybrid_moe.placement.routing_profile import RoutingProfile
from hybrid_moe.placement.routing_profile_file import read_routing_profile
from hybrid_moe.placement.routing_statistics import hit_rate_curve
from tests.examples.test_tiny_moe import EXAMPLE, MODEL, TEXT

NAMES = ("persuasion", "tom_sawyer", "python_code")
QUARTER = 16
"""Of 4 layers of 16 experts."""


@pytest.fixture(scope="module")
def read_now() -> RoutingProfile:
    """What the model does with a page of Jane Austen."""
    model = hybrid_moe.from_pretrained(MODEL, method="MXFP4", progress=False)
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode(), recorded_routing(model) as recorder:
        model(input_ids=ids)
    return recorder.profile()


def stored(name: str) -> RoutingProfile:
    return read_routing_profile(EXAMPLE / "profiles" / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_this_model(name: str, read_now: RoutingProfile) -> None:
    profile = stored(name)
    assert profile.model == read_now.model
    profile.check(read_now.model, name)
    assert profile.source == f"{name}.txt"
    assert min(profile.prefill.sum(), profile.decode.sum()) > 0
    assert profile.counts.sum(1).tolist() == [profile.tokens.sum() * profile.model.top_k] * 4
    np.testing.assert_array_equal(profile.windows.sum(0), profile.counts)
    assert profile.pairs is not None and profile.pairs_kept.tolist() == [1.0] * 4
    k = profile.model.top_k  # each expert of a token is one of k - 1 pairs
    np.testing.assert_array_equal(profile.pairs.sum(2), profile.counts * (k - 1))
    assert (EXAMPLE / "profiles" / f"{name}.json").stat().st_size < 16 << 10


def test_a_profile_of_the_author_fits_the_author_best(read_now: RoutingProfile) -> None:
    hits = {name: hit_rate_curve(stored(name).counts, read_now.counts)[QUARTER] for name in NAMES}
    assert hits["persuasion"] == max(hits.values())
    assert hits["persuasion"] > QUARTER / 64  # more than ids chosen blindly


def test_the_picture_is_there() -> None:
    picture = Path(EXAMPLE) / "profiles" / "persuasion.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
