"""Routers that hand their logits to our gating: `offload(router="cute")`.

A router of a family that `SCORING` names computes its logits as ever; what follows (scores, groups,
the choice, weights) is one call of `gating_topk`: one kernel on a GPU instead of torch's five to
twenty, and the reference in torch elsewhere. Among equal values its order is the documented one,
which that of torch.topk on a CPU is not.

That a router does what its row says is tried on random values, in float32, before anything is
changed: a later version of Transformers may compute something else under the same name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from hybrid_moe.gpu_kernels.gating import SCORINGS, Gating
from hybrid_moe.gpu_kernels.gating_topk import gating_topk
from hybrid_moe.integrations.transformers.step.plain import only_computes
from hybrid_moe.integrations.transformers.step.router import is_router, linear

_log = logging.getLogger(__name__)

CUTE = "cute"
"""The choice of `router` that is not Transformers' own."""

_MODELS = {
    "mixtral": "Mixtral MiniMax",
    "qwen3": "Qwen2Moe Qwen3Moe Qwen3Next Qwen3VLMoeText Qwen3OmniMoeText Qwen3OmniMoeThinkerText "
    "Qwen3OmniMoeTalkerText Qwen3_5Moe Qwen4ExpText FlexOlmo Mellum Olmoe",
    "gpt_oss": "GptOss",
    "deepseek_v3": "DeepseekV3 DeepseekV32 AXK1 BailingHybrid Dots1 Dots3NoteText ExaoneMoe "
    "Glm4Moe Glm4MoeLite Glm4vMoeText Glm5NextText GlmMoeDsa HYV4 KimiLinear MiMoV2Flash NemotronH "
    "SolarOpen",
    "deepseek_v4": "DeepseekV4",
}
"""Row of `SCORINGS` -> models whose router it is, as Transformers 5.23 has them."""

SCORING = {
    f"{name}Top{'k' if scoring == 'deepseek_v3' else 'K'}Router": scoring
    for scoring, names in _MODELS.items()
    for name in names.split()
}
"""Class of a router in Transformers -> its row of `SCORINGS`."""

HASHED = frozenset({"DeepseekV4HashRouter"})
"""Routers that look a token's experts up: there is nothing to choose, and they stay as they are."""

_GATING = "_hybrid_moe_gating"
"""A module's attribute."""


@dataclass(frozen=True)
class RouterGating:
    """What becomes of a router's logits.

    Attributes:
        gating: see there.
        float32: hidden states and weights are converted before they are multiplied.
    """

    gating: Gating
    float32: bool

    @classmethod
    def of(cls, module: Any) -> RouterGating:
        """Read from a router of `SCORING`, whose attributes have the same names in all families."""
        scoring = SCORING[type(module).__name__]
        gating = Gating(
            scoring,
            module.top_k,
            bool(getattr(module, "norm_topk_prob", True)) and scoring != "gpt_oss",
            float(getattr(module, "routed_scaling_factor", 1.0)),
            getattr(module, "num_group", None) or 1,
            getattr(module, "topk_group", None) or 1,
        )
        return cls(gating, float32=scoring == "deepseek_v3")


def check_router(router: str | None) -> None:
    """Raise ValueError unless `router` is a choice that there is."""
    if router not in (None, CUTE):
        raise ValueError(f"router is {router!r}: choices are None (the model's own) and {CUTE!r}")


def plan_routers(
    model: torch.nn.Module, experts: Iterable[str]
) -> dict[str, tuple[torch.nn.Module, RouterGating]]:
    """The routers beside a model's experts modules, by name, and what becomes of their logits.

    Args:
        experts: names of the experts modules.

    Raises:
        NotImplementedError: a router is none of `SCORING`, or computes something else; names it.
    """
    plans, tried = {}, set[tuple[str, RouterGating]]()
    for name in experts:
        parent = name.rpartition(".")[0]
        children = model.get_submodule(parent).named_children()
        beside = {f"{parent}.{n}": m for n, m in children if is_router(m)}
        kinds = {n: type(m).__name__ for n, m in beside.items()}
        if set(kinds.values()) <= HASHED and kinds:
            continue
        if len(kinds) != 1 or not set(kinds.values()) <= SCORING.keys():
            block = type(model.get_submodule(parent)).__name__
            found = ", ".join(f"{n} ({kind})" for n, kind in kinds.items())
            raise NotImplementedError(
                f'router="cute": the router of {name} is {found or f"a part of its {block}"}; '
                f"known are {', '.join(sorted(SCORING))}"
            )
        [(router, module)] = beside.items()
        plan = RouterGating.of(module)
        _check(router, module, plan)
        if (key := (kinds[router], plan)) not in tried:
            _try(router, module, plan)
            tried.add(key)
        plans[router] = module, plan
    return plans


def gate_routers(plans: dict[str, tuple[torch.nn.Module, RouterGating]]) -> None:
    """Let the routers of `plan_routers` call our gating."""
    if not plans:
        return
    for module, plan in plans.values():
        module.__dict__[_GATING] = plan
        module.__dict__["forward"] = MethodType(_forward, module)
    on = sorted({str(module.weight.device) for module, _ in plans.values()})
    _log.info("%d routers choose experts by our gating, on %s", len(plans), ", ".join(on))


def _forward(module: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """A router's `forward`. With gradients, under autocast and in graphs that torch captures it is
    the module's own."""
    if (
        args
        or kwargs
        or torch.compiler.is_compiling()
        or not only_computes(hidden_states)
        or torch.is_autocast_enabled(hidden_states.device.type)
    ):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    return gate(module, module.__dict__[_GATING], hidden_states)


def gate(
    module: Any, plan: RouterGating, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What routers return: logits [T, E], weights [T, k] and ids int64 [T, k], in their dtypes."""
    weight, bias = module.weight, getattr(module, "bias", None)
    flat = hidden_states.reshape(-1, weight.shape[1])
    if plan.float32:
        flat, weight = flat.float(), weight.float()
    logits = linear(flat, weight, bias)
    ids, weights = gating_topk(
        logits, plan.gating, getattr(module, "e_score_correction_bias", None)
    )
    rounds = SCORINGS[plan.gating.scoring].rounding != "never"
    return logits, weights.to(logits.dtype) if rounds else weights, ids.long()


def _check(name: str, module: Any, plan: RouterGating) -> None:
    """Raise NotImplementedError for sizes and dtypes that `gating_topk` does not take."""
    what = f'router="cute": {name} ({type(module).__name__})'
    if module.weight.dtype not in (torch.float32, torch.bfloat16) and not plan.float32:
        raise NotImplementedError(f"{what} is {module.weight.dtype}, must be float32 or bfloat16")
    try:
        plan.gating.check(module.weight.shape[0])
    except ValueError as error:
        raise NotImplementedError(f"{what}: {error}") from error


@torch.no_grad()
def _try(name: str, module: Any, plan: RouterGating) -> None:
    """Raise NotImplementedError unless a copy with random weights computes what the plan says."""
    rng = torch.Generator().manual_seed(0)
    other = copy.deepcopy(module).to_empty(device="cpu").float()
    for values in (*other.parameters(), *other.buffers()):
        values.copy_(torch.randn(values.shape, generator=rng) * values.shape[-1] ** -0.5)
    x = torch.randn(8, other.weight.shape[1], generator=rng)
    expected, found = other(x), gate(other, plan, x)
    if isinstance(expected, tuple) and len(expected) == len(found):
        (_, its_weights, its_ids), (_, weights, ids) = expected, found
        if torch.equal(its_ids.sort(-1).values, ids.sort(-1).values):
            ours, own = (
                weights.gather(1, ids.argsort(-1)),
                its_weights.gather(1, its_ids.argsort(-1)),
            )
            if torch.allclose(ours, own, rtol=1e-5, atol=0):
                return
    raise NotImplementedError(
        f'router="cute": {name} ({type(module).__name__}) does not compute what '
        f"{plan.gating} says: this version of Transformers is not known"
    )
