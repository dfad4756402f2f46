"""Tiny models on one thread of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.tiny_models import build


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A checkpoint of the tiny Qwen3-MoE."""
    return save(build("qwen3_moe"), tmp_path / "qwen")
