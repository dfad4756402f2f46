"""Gating by top-k: its order against NumPy, its rows against the models' own routers, and the
kernel in the simulator against the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hybrid_moe.gpu_kernels.definition import ARCHITECTURES
from hybrid_moe.gpu_kernels.gating import SCORINGS, Gating
from hybrid_moe.gpu_kernels.gating_topk import (
    choose_config,
    definition,
    gating_topk,
    gating_topk_ref,
)
from tests.gpu.harness import distinct_architectures, simulate

F32, BF16 = torch.float32, torch.bfloat16
H, E, K = 64, 64, 6


def _row(name: str) -> Gating:
    """A gating of that row, for E experts."""
    if name == "deepseek_v3":
        return Gating(name, K, True, 2.5, groups=8, kept_groups=4)
    return Gating(name, K, renormalise=name in ("mixtral", "deepseek_v4"))


# ---- the order


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(SCORINGS)),
    levels=st.integers(1, 6),
    dtype=st.sampled_from([F32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_larger_values_first_then_lower_ids(
    name: str, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """Against NumPy's lexsort, with few different logits, so that most values are tied."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-levels, levels + 1, (7, E)) / 4
    gating = _row(name)
    ids, weights = gating_topk(torch.from_numpy(logits).to(dtype), gating)
    assert ids.dtype == torch.int32 and weights.dtype == F32
    for found, row in zip(ids.numpy(), logits, strict=True):
        if gating.groups > 1:  # sigmoid(x) + sigmoid(y) of each group's two largest
            tops = np.sort(row.reshape(gating.groups, -1))[:, -2:]
            scores = (1 / (1 + np.exp(-tops))).sum(1).round(6)
            kept = np.lexsort((np.arange(gating.groups), -scores))[: gating.kept_groups]
            row = np.where(np.isin(np.arange(E) // (E // gating.groups), kept), row, -np.inf)
        expected = np.lexsort((np.arange(E), -row))[:K]
        assert found.tolist() == expected.tolist()


# ---- the models' routers


def _deepseek_v4() -> tuple[nn.Module, Gating]:
    config = DeepseekV4Config(hidden_size=H, n_routed_experts=E, num_experts_per_tok=K)
    gating = Gating("deepseek_v4", K, True, config.routed_scaling_factor)
    return DeepseekV4TopKRouter(config), gating


ROUTERS: dict[str, Any] = {
    "mixtral": lambda: (
        MixtralTopKRouter(
            MixtralConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)
        ),
        Gating("mixtral", K, renormalise=True),
    ),
    **{
        f"qwen3_moe-{norm}": lambda norm=norm: (
            Qwen3MoeTopKRouter(
                Qwen3MoeConfig(
                    hidden_size=H, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm
                )
            ),
            Gating("qwen3", K, renormalise=norm),
        )
        for norm in (False, True)
    },
    "gpt_oss": lambda: (
        GptOssTopKRouter(GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)),
        Gating("gpt_oss", K),
    ),
    "deepseek_v3": lambda: (
        DeepseekV3TopkRouter(
            DeepseekV3Config(
                hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, n_group=8, topk_group=3
            )
        ),
        Gating("deepseek_v3", K, True, 2.5, groups=8, kept_groups=3),
    ),
    "deepseek_v4": _deepseek_v4,
    "glm4_moe": lambda: (
        Glm4MoeTopkRouter(
            Glm4MoeConfig(
                hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, norm_topk_prob=False,
                n_group=1, topk_group=1, routed_scaling_factor=1.5,
            )
        ),
        Gating("deepseek_v3", K, scaling=1.5),
    ),
}  # fmt: skip
"""Name -> a router of Transformers and what it does in our words."""


def _router(name: str, dtype: torch.dtype, tied: bool) -> tuple[nn.Module, Gating, Any]:
    """With a bias in float32, where there is one. `tied`: experts in pairs have equal weights."""
    torch.manual_seed(0)
    module, gating = ROUTERS[name]()
    module = module.to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
        if tied:
            parameter.data[E // 2 :] = parameter.data[: E // 2]
    bias = getattr(module, "e_score_correction_bias", None)
    if bias is not None:
        bias.data = torch.randn(E) * 0.05
        if tied:
            bias.data[E // 2 :] = bias.data[: E // 2]
    return module, gating, bias


def _stable_topk(values: torch.Tensor, k: int, dim: int = -1, sorted: bool = True) -> Any:
    """torch.topk in the order that we promise."""
    order = torch.argsort(values, dim=dim, descending=True, stable=True).narrow(dim, 0, k)
    return torch.return_types.topk((values.gather(dim, order), order))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_the_reference_is_the_model_s_router(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, ids and weights, ties included, given a torch.topk that breaks them as we do."""
    module, gating, bias = _router(name, dtype, tied=True)
    monkeypatch.setattr(torch, "topk", _stable_topk)
    logits, weights, ids = module(torch.randn(300, H, dtype=dtype))
    found, found_weights = gating_topk(logits, gating, bias)
    assert torch.equal(found, ids.int())
    assert torch.equal(found_weights, weights.float())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_torch_s_own_choice_differs_in_ties_alone(name: str, dtype: torch.dtype) -> None:
    """With the real torch.topk: where the experts are others, their values are those of ours. A
    router that does not sort adds up its weights in another order."""
    module, gating, bias = _router(name, dtype, tied=False)
    logits, weights, ids = module(torch.randn(300, H, dtype=dtype))
    found, found_weights = gating_topk(logits, gating, bias)
    same = (ids.sort(-1).values == found.sort(-1).values).all(-1)
    assert same.float().mean() > 0.9
    exact = weights.gather(1, ids.argsort(-1))[same].float()
    ours = found_weights.gather(1, found.argsort(-1))[same]
    roundings = 2.0**-7 if weights.dtype == BF16 else (K + 2) * 2.0**-24
    torch.testing.assert_close(ours, exact, rtol=roundings, atol=0)
    values = logits
    if SCORINGS[gating.scoring].function == "sigmoid":
        values = logits.sigmoid() + bias
    elif SCORINGS[gating.scoring].function == "sqrtsoftplus":
        values = nn.functional.softplus(logits).sqrt() + bias
    if gating.groups > 1:  # float32: no ties, and so no other groups
        assert same.all()
    assert torch.equal(
        values.gather(1, ids).sort(-1).values, values.gather(1, found.long()).sort(-1).values
    )


# ---- the kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and how many tokens it gets."""

    gating: Gating
    experts: int
    logits: torch.dtype
    bias: torch.dtype | None = None
    dtype: torch.dtype | None = None
    tokens: int = 5
    warps: int = 1


GENERATIONS = ("sm_80", "sm_90", "sm_100")
"""Whose texts differ: sm_90 and sm_100 have more instructions for bf16."""

CASES = {
    "mixtral": Case(Gating("mixtral", 2, True), 8, F32, tokens=7, warps=4),
    "qwen3": Case(Gating("qwen3", 16, True), 1000, BF16),
    "gpt_oss": Case(Gating("gpt_oss", 4), 32, BF16),
    "deepseek_v3": Case(Gating("deepseek_v3", 8, True, 2.5, 8, 4), 256, F32, F32),
    "glm4_moe": Case(Gating("deepseek_v3", 6, False, 1.5, 5, 2), 60, F32, F32),
    "deepseek_v4": Case(Gating("deepseek_v4", 6, True, 1.5), 256, BF16, F32),
    "deepseek_v4-bf16-bias": Case(Gating("deepseek_v4", 3, True, 1.5), 40, BF16, BF16),
    "switch": Case(Gating("switch", 1), 64, F32, dtype=BF16),
    "one-expert-one-token": Case(Gating("mixtral", 1, True), 1, F32, tokens=1),
}


def _logits(case: Case) -> torch.Tensor:
    """Ordinary ones, and a token with ties, one with infinities, one that is NaN in part."""
    torch.manual_seed(1)
    logits = torch.randn(case.tokens, case.experts) * 2
    for token, special in enumerate((None, "ties", "inf", "nan")[: case.tokens]):
        if special == "ties":
            logits[token] = logits[token].round()
        elif special == "inf":
            logits[token, ::3] = -torch.inf
        elif special == "nan":
            logits[token, 1::5] = torch.nan
    return logits.to(case.logits)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_reference(name: str) -> None:
    """On every architecture, with schedules of all kinds: the same experts, and weights that differ
    by the roundings of exp and of sums in another order."""
    case = CASES[name]
    logits = _logits(case)
    bias = None if case.bias is None else (torch.randn(case.experts) * 0.1).to(case.bias)
    config = dataclasses.replace(
        choose_config(case.gating, case.experts, case.logits, case.tokens, case.bias, case.dtype),
        warps=case.warps,
    )
    expected, weights = gating_topk_ref(logits, case.gating, bias, case.dtype)
    kernel = definition(config)
    large = (
        case.experts > 256
    )  # six compilations of 32 values a lane take as long as all the others
    for arch in distinct_architectures(kernel, GENERATIONS if large else ARCHITECTURES):
        for seed in (None, 1, 2):
            ids = torch.full_like(expected, -77)
            found = torch.full_like(weights, -77.0)
            values = (
                logits, None if bias is None else bias.float(), ids, found, case.tokens,
            )  # fmt: skip
            report = simulate(kernel, arch, (-(-case.tokens // case.warps),), values, seed)
            assert torch.equal(ids, expected)
            roundings = 2.0**-8 if config.rounds else (case.experts / 32 + 24) * 2.0**-24
            torch.testing.assert_close(found, weights, rtol=roundings, atol=0, equal_nan=True)
            if seed is None and case.experts * logits.element_size() % 32 == 0:  # rows of sectors
                assert all(a.units == a.ideal for a in report.of("logits")), str(report)


def test_a_token_s_experts_and_weights_do_not_depend_on_the_launch() -> None:
    """Bits: one token alone, and among others in a block of four warps."""
    case = CASES["mixtral"]
    logits = _logits(case)
    few, many = (choose_config(case.gating, case.experts, F32, tokens) for tokens in (1, 100_000))
    assert (few.warps, many.warps) == (1, 4)
    results = []
    for config, rows in ((few, logits[5:6]), (many, logits)):
        ids = torch.zeros(len(rows), 2, dtype=torch.int32)
        weights = torch.zeros(len(rows), 2)
        blocks = -(-len(rows) // config.warps)
        values = (rows.contiguous(), None, ids, weights, len(rows))
        simulate(definition(config), "sm_80", (blocks,), values, seed=3)
        results.append((ids, weights))
    (one, its), (all_, theirs) = results
    assert torch.equal(one[0], all_[5]) and torch.equal(its[0], theirs[5])


# ---- arguments


def test_no_tokens() -> None:
    ids, weights = gating_topk(torch.empty(0, E), Gating("qwen3", K))
    assert ids.shape == weights.shape == (0, K)


GOOD = Gating("deepseek_v3", 4)


@pytest.mark.parametrize(
    "error, message, logits, gating, bias",
    [
        (ValueError, "scoring is 'dense'", torch.zeros(2, 8), Gating("dense", 1), None),
        (ValueError, "top_k is 9", torch.zeros(2, 8), Gating("qwen3", 9), None),
        (ValueError, "top_k is 33", torch.zeros(2, 64), Gating("qwen3", 33), None),
        (ValueError, "of 1025 experts", torch.zeros(2, 1025), GOOD, None),
        (ValueError, "scaling is nan", torch.zeros(2, 8), Gating("qwen3", 1, scaling=np.nan), None),
        (ValueError, "groups is 3", torch.zeros(2, 8), Gating("qwen3", 1, groups=3), None),
        (ValueError, "kept_groups is 3", torch.zeros(2, 8), Gating("qwen3", 1, False, 1, 2, 3),
         None),
        (ValueError, "groups is 4", torch.zeros(2, 8), Gating("qwen3", 4, False, 1, 4, 1), None),
        (ValueError, "logits have shape", torch.zeros(8), GOOD, None),
        (TypeError, "logits are", torch.zeros(2, 8).half(), GOOD, None),
        (ValueError, "logits must be contiguous", torch.zeros(8, 2).T, GOOD, None),
        (ValueError, "bias: .* qwen3", torch.zeros(2, 8), Gating("qwen3", 1), torch.zeros(8)),
        (ValueError, "bias: .* switch", torch.zeros(2, 8), Gating("switch", 1), torch.zeros(8)),
        (ValueError, "bias has shape", torch.zeros(2, 8), GOOD, torch.zeros(9)),
        (TypeError, "bias is", torch.zeros(2, 8), GOOD, torch.zeros(8).double()),
        (ValueError, "bias must be", torch.zeros(2, 8), GOOD, torch.zeros(16)[::2]),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    error: type[Exception],
    message: str,
    logits: torch.Tensor,
    gating: Gating,
    bias: torch.Tensor | None,
) -> None:
    with pytest.raises(error, match=message):
        gating_topk(logits, gating, bias)


def test_a_dtype_that_no_model_has() -> None:
    with pytest.raises(TypeError, match="dtype is"):
        gating_topk(torch.zeros(2, 8), GOOD, dtype=torch.float16)
