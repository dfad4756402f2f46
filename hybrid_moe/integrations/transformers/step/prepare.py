"""What a model gets so that its decode steps leave the processor to the pool."""

from __future__ import annotations

import logging

import torch

from hybrid_moe.integrations.transformers.step.norm import replace_norms
from hybrid_moe.integrations.transformers.step.threads import scope_threads

_log = logging.getLogger(__name__)


def prepare_steps(model: torch.nn.Module) -> None:
    """Let norms of few tokens run compiled, and torch's threads make room in decode steps.

    The model's classes, parameters and results stay as they are. Idempotent; weights may be loaded
    later.
    """
    norms = replace_norms(model)
    scope_threads(model)
    _log.info("%d norms of %s run compiled", norms, type(model).__name__)
