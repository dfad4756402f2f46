"""What a model gets so that its decode steps leave the processor to the pool."""

from __future__ import annotations

import logging

import torch

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.integrations.transformers.gated_drafts import gate_drafts
from hybrid_moe.integrations.transformers.step.attention import use_attention
from hybrid_moe.integrations.transformers.step.growing_cache import use_cache
from hybrid_moe.integrations.transformers.step.norm import replace_norms
from hybrid_moe.integrations.transformers.step.rotary import replace_rotary
from hybrid_moe.integrations.transformers.step.router import replace_router_logits
from hybrid_moe.integrations.transformers.step.threads import scope_threads

_log = logging.getLogger(__name__)


def prepare_steps(
    model: torch.nn.Module, pool: PoolConfig | None = None, *, attention: bool = True
) -> None:
    """Let attention of few tokens and its cache be the pool's, and norms, rotary positions and
    routers' logits of few tokens run compiled; torch's threads make room in decode steps, and
    drafts are as long as pays.

    The model's classes and parameters stay as they are, and all results but those of attention to
    the bit. Idempotent; weights may be loaded later.

    Args:
        model: any of Transformers.
        pool: that of its layers, whose workers stay awake in decode steps.
        attention: False where the user has chosen an implementation of attention.
    """
    if attention:
        use_attention(model, pool)
    use_cache(model)
    gate_drafts(model)
    norms, rotary = replace_norms(model), replace_rotary(model)
    routers = replace_router_logits(model)
    scope_threads(model, pool)
    _log.info(
        "%s: %d norms, %d rotary embeddings and %d routers run compiled",
        type(model).__name__,
        norms,
        rotary,
        routers,
    )
