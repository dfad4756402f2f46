"""A machine to plan for, and header-only checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hybrid_moe.planning import Model, read_model
from tests.hybrid_moe.planning.fake_checkpoints import MODELS, write_headers

Fake = Callable[[str], Path]


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    """The directory of a header-only checkpoint of `MODELS`, by its name."""
    root = tmp_path_factory.mktemp("headers")
    return cache(lambda name: write_headers(root / name, MODELS[name]))


@pytest.fixture(scope="session")
def gpt_oss(fake: Fake) -> Model:
    """gpt-oss-20b, which has few tensors."""
    return read_model(fake("gpt-oss-20b"))
