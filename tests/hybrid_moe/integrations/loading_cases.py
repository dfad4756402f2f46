"""Checkpoints that `from_pretrained` loads, and what Transformers makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.registration import from_pretrained


def load(directory: Path, method: str | None = "BF16", **kwargs: Any) -> Any:
    return from_pretrained(directory, method, threads=1, progress=False, **kwargs)


def plain(directory: Path) -> Any:
    """What Transformers makes of the checkpoint."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def hybrid_experts(model: Any) -> Iterator[HybridExperts]:
    return (m for m in model.modules() if isinstance(m, HybridExperts))
