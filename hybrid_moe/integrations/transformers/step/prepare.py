"""What a model gets so that its decode steps leave the processor to the pool."""

from __future__ import annotations

import logging

import torch

from hybrid_moe.integrations.transformers.step.norm import replace_norms
from hybrid_moe.integrations.transformers.step.rotary import replace_rotary
from hybrid_moe.integrations.transformers.step.router import replace_router_logits
from hybrid_moe.integrations.transformers.step.threads import scope_threads

_log = logging.getLogger(__name__)


def prepare_steps(model: torch.nn.Module) -> None:
    """Let norms, rotary positions and routers' logits of few tokens run compiled, and torch's
    threads make room in decode steps.

    The model's classes, parameters and results stay as they are, to the bit. Idempotent; weights
    may be loaded later.
    """
    norms, rotary = replace_norms(model), replace_rotary(model)
    routers = replace_router_logits(model)
    scope_threads(model)
    _log.info(
        "%s: %d norms, %d rotary embeddings and %d routers run compiled",
        type(model).__name__,
        norms,
        rotary,
        routers,
    )
