"""Attention of Transformers models: masks as ranges, decoding and prefill against float64, what
goes elsewhere, and whole models against their eager implementation."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # that of `Module`
from transformers.models.gpt_oss import modeling_gpt_oss

from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores
from hybrid_moe.integrations.transformers.step import attention, prefill
from hybrid_moe.integrations.transformers.step.attention import attention_forward, use_attention
from hybrid_moe.integrations.transformers.step.growing_cache import grow, growing_cache, use_cache
from hybrid_moe.integrations.transformers.step.key_ranges import KeyRanges, key_ranges_mask
from tests.cpu_kernels.attention_problem import Problem
from tests.hybrid_moe.tiny_models import FAMILIES, build, greedy, prompt

POOL = PoolConfig(min(2, usable_cores()))


# masks


@settings(max_examples=150, deadline=None)
@given(
    queries=st.integers(1, 6),
    past=st.integers(0, 12),
    dropped=st.integers(0, 4),
    behind=st.integers(0, 3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    padding=st.sampled_from(["none", "left", "right", "holes", "all real"]),
    seed=st.integers(0, 99),
)
def test_masks(
    queries: int, past: int, dropped: int, behind: int, window: int | None, padding: str, seed: int
) -> None:
    """What `key_ranges_mask` says is what SDPA's mask says, whatever kind of mask it is. Keys that
    a window has dropped and room behind the keys (static caches) included."""
    dropped = min(dropped, past)
    keys = past + queries - dropped + behind
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if padding != "none":
        mask = torch.ones(2, past + queries + behind, dtype=torch.bool)
        count = int(torch.randint(0, past + queries, (1,), generator=generator))
        if padding == "left":
            mask[0, :count] = False
        elif padding == "right":
            mask[0, past + queries - count : past + queries] = False
        elif padding == "holes":
            mask = torch.rand(mask.shape, generator=generator) < 0.5
        if behind:
            mask[:, past + queries :] = False
    function = (
        masking_utils.causal_mask_function
        if window is None
        else masking_utils.sliding_window_causal_mask_function(window)
    )
    arguments = (2, queries, keys, past, dropped, function, mask, window)
    found = key_ranges_mask(*arguments)
    expected = masking_utils.sdpa_mask(*arguments, allow_is_causal_skip=False)
    expected = expected.expand(2, 1, queries, keys)
    if padding in ("none", "all real", "left"):
        assert not isinstance(found, torch.Tensor)
    if found is None:  # as SDPA takes it: all keys for one token, causal for as many as keys
        found = KeyRanges(keys if queries == 1 else queries)
    if isinstance(found, KeyRanges):
        found = found.tensor(queries, keys)
    assert torch.equal(found.expand(2, 1, queries, keys), expected)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        masking_utils.sliding_window_causal_mask_function(3),  # not the size that is said
        masking_utils.bidirectional_mask_function,
        lambda b, h, q, k: k <= q,
    ],
)
def test_masks_that_are_not_known_are_tensors(function: Any) -> None:
    found = key_ranges_mask(1, 5, 5, mask_function=function, local_size=4)
    expected = masking_utils.sdpa_mask(
        1, 5, 5, mask_function=function, local_size=4, allow_is_causal_skip=True
    )
    assert found is expected is None or torch.equal(found, expected)  # type: ignore[arg-type]


def test_a_mask_to_work_on_is_a_tensor() -> None:
    found = key_ranges_mask(1, 5, 5, allow_is_causal_skip=False)
    assert isinstance(found, torch.Tensor)


# one call


DECODE = (
    Problem(1, 2, 8, 1, 300, 64, 64, sinks=True),
    Problem(2, 2, 2, 3, 200, 64, 64, window=64, padded=True, sinks=True),
    Problem(2, 1, 4, 1, 90, 128, 96),
)
PREFILL = (
    Problem(1, 2, 4, 90, 90, 64, 64, sinks=True),
    Problem(2, 2, 2, 40, 130, 96, 80, sinks=True),
    Problem(1, 2, 3, 20, 50, 80, 96, sinks=True),
    Problem(2, 1, 4, 70, 70, 64, 64, padded=True),
    Problem(2, 2, 2, 90, 150, 64, 64, window=20, padded=True, sinks=True),
    Problem(1, 1, 2, 100, 100, 32, 32, window=33, sinks=True),
)


class Module(torch.nn.Module):
    """What attention functions read of a module of Transformers."""

    is_causal = True

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.num_key_value_groups = problem.G


def states(p: Problem, seed: int = 0) -> tuple[list[torch.Tensor], KeyRanges, torch.Tensor | None]:
    """q, keys, values as views of a cache with NaN behind them and in padding; ranges; sinks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    first = torch.randint(0, p.T, (p.B,), generator=generator) if p.padded else None
    made = [random(p.B, p.H * p.G, p.Q, p.key_dim)]
    for dim in (p.key_dim, p.value_dim):
        memory = torch.full((p.B, p.H, p.T + 9, dim), torch.nan, dtype=torch.bfloat16)
        memory[:, :, : p.T] = random(p.B, p.H, p.T, dim)
        for b, begin in enumerate([] if first is None else first.tolist()):
            memory[b, :, :begin] = torch.nan
        made.append(memory[:, :, : p.T])
    sinks = random(p.H * p.G) if p.sinks else None
    return made, KeyRanges(p.T, p.window, first), sinks


def evaluate(
    p: Problem, made: list[torch.Tensor], ranges: KeyRanges, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in float64 [B, Q, heads, value dim], and a bound on the error of each element.

    Weights are rounded to bf16 (those of the kernel in numerator and denominator), outputs of parts
    of the keys are, and the output is: 3 * 2^-8 of sum(p |v|); a score's float32 sum, exponential
    and rescaling add less than 2^-12 of it.
    """
    q, k, v = (t.double().nan_to_num() for t in made)
    k, v = (t.repeat_interleave(p.G, 1) for t in (k, v))
    seen = ranges.tensor(p.Q, p.T)
    scores = (q @ k.transpose(2, 3) * p.key_dim**-0.5).masked_fill(~seen, -torch.inf)
    sink = torch.full((p.H * p.G,), -torch.inf) if sinks is None else sinks
    column = sink.double().view(1, -1, 1, 1).expand(p.B, -1, p.Q, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    weights = weights.nan_to_num()  # of tokens that see nothing
    out, spread = (weights @ each for each in (v, v.abs()))
    bound = spread * (3 * 2.0**-8 + 2.0**-12)
    return out.transpose(1, 2), bound.transpose(1, 2)


@pytest.mark.parametrize("p", (*DECODE, *PREFILL), ids=str)
@torch.no_grad()
def test_output(p: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "BLOCK", 32)
    made, ranges, sinks = states(p)
    out, weights = attention_forward(Module(p), *made, ranges, scaling=p.key_dim**-0.5, s_aux=sinks)
    expected, bound = evaluate(p, made, ranges, sinks)
    error = (out.double() - expected).abs()
    assert weights is None
    assert (error <= bound).all(), (error / bound).max()


@torch.no_grad()
def test_prefill_takes_what_decoding_takes() -> None:
    for p in DECODE:
        made, ranges, sinks = states(p)
        out = prefill.prefill(*made, ranges, p.key_dim**-0.5, sinks)
        expected, bound = evaluate(p, made, ranges, sinks)
        assert ((out.double() - expected).abs() <= bound).all()


@torch.no_grad()
def test_without_a_mask() -> None:
    """One token sees all keys; several are the first ones, as Transformers' SDPA has it."""
    for Q in (1, 5, 40):
        p = Problem(1, 2, 2, Q, 40, 32, 32)
        made, _, _ = states(p)
        seen = 40 if Q == 1 else Q
        found = attention_forward(Module(p), *made, None)[0]
        clipped = [made[0], *(t[:, :, :seen] for t in made[1:])]
        short = Problem(1, 2, 2, Q, seen, 32, 32)
        expected, bound = evaluate(short, clipped, KeyRanges(seen), None)
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"softcap": 30.0}, "soft cap"),
        ({"output_attentions": True}, "weights are asked for"),
        ({"position_bias": torch.zeros(1, 4, 1, 20)}, "position bias"),
        ({"dropout": 1e-9}, "dropout"),
        ({"dtype": torch.float32}, "not bfloat16"),
        ({"requires_grad": True}, "gradients"),
        ({"mask": torch.ones(1, 1, 1, 20, dtype=torch.bool)}, "no range of keys"),
        ({"key_dim": 24}, "multiple of 16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_goes_elsewhere_says_so(
    changes: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And is computed there: by SDPA, or with a soft cap or weights by the model's own."""
    messages: list[str] = []
    monkeypatch.setattr(attention, "warn_once", messages.append)
    monkeypatch.setattr(attention, "_decoder", lambda *_: pytest.fail("computed by the pool"))
    changes = dict(changes)
    dim, dtype = changes.pop("key_dim", 32), changes.pop("dtype", torch.bfloat16)
    p = Problem(1, 2, 2, 1, 20, dim, dim)
    made, _, _ = states(p)
    made = [t.to(dtype).requires_grad_(changes.get("requires_grad", False)) for t in made]
    changes.pop("requires_grad", None)
    mask, changes["scaling"] = changes.pop("mask", None), dim**-0.5
    module = Module(p)
    out, weights = attention_forward(module, *made, mask, **changes)
    if {"softcap", "output_attentions"} & set(changes):
        expected, expected_weights = eager_attention_forward(module, *made, None, **changes)
        assert torch.equal(weights, expected_weights)
    else:
        expected, _ = sdpa_attention_forward(module, *made, mask, **changes)
    assert torch.equal(out, expected)
    assert len(messages) == 1
    assert told in messages[0]


def test_gradients_with_sinks_are_those_of_the_eager_attention() -> None:
    p = Problem(1, 2, 2, 5, 5, 32, 32, sinks=True)
    made, ranges, sinks = states(p)
    assert sinks is not None
    module = modeling_gpt_oss.GptOssAttention(FAMILIES["gpt_oss"](), 0)
    module.sinks = torch.nn.Parameter(sinks)
    module.num_key_value_groups = p.G
    module.train(False)
    results = []
    for ours in (True, False):
        inputs = [t.clone().requires_grad_() for t in made]
        module.sinks.grad = None
        if ours:
            out, _ = attention_forward(module, *inputs, ranges, scaling=0.2, s_aux=module.sinks)
        else:
            mask = torch.full((5, 5), torch.finfo(torch.bfloat16).min).triu(1).bfloat16()
            out, _ = modeling_gpt_oss.eager_attention_forward(module, *inputs, mask, scaling=0.2)
        out.float().square().sum().backward()
        results.append([out, module.sinks.grad, *(t.grad for t in inputs)])
    assert all(map(torch.equal, *results))


def test_attention_that_is_not_causal_is_sdpa() -> None:
    p = Problem(1, 2, 2, 20, 20, 32, 32)
    made, _, _ = states(p)
    out, _ = attention_forward(Module(p), *made, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(*made, enable_gqa=True)
    assert torch.equal(out, expected.transpose(1, 2))


def test_a_mask_of_more_keys_than_there_are_is_refused() -> None:
    made, _, _ = states(Problem(1, 2, 2, 1, 20, 32, 32))
    with torch.no_grad(), pytest.raises(ValueError, match="a mask of 21 keys for 20"):
        attention_forward(torch.nn.Identity(), *made, KeyRanges(21))


@pytest.mark.parametrize("queries", [1, 20])
def test_no_sequences(queries: int) -> None:
    made, ranges, _ = states(Problem(1, 2, 2, queries, 600, 32, 48))
    with torch.no_grad():
        out, _ = attention_forward(torch.nn.Identity(), *(t[:0] for t in made), ranges)
    assert out.shape == (0, queries, 4, 48)


def test_more_queries_than_keys_without_a_mask_are_as_sdpa_has_them() -> None:
    p = Problem(1, 2, 2, 20, 20, 32, 32)
    (query, key, value), _, _ = states(p)
    few = (query, key[:, :, :12], value[:, :, :12])
    with torch.no_grad():
        out, _ = attention_forward(Module(p), *few, None)
        expected, _ = sdpa_attention_forward(Module(p), *few, None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", ["sequences", "value heads", "keys", "padding", "group"])
def test_states_that_do_not_fit_are_not_read(case: str) -> None:
    """Beyond the end of one of them: what they are then is SDPA's to say."""
    (query, key, value), _, _ = states(Problem(2, 2, 2, 1, 20, 32, 32))
    ranges = KeyRanges(20)
    if case == "sequences":
        key, value = key[:1], value[:1]
    elif case == "value heads":
        value = value[:, :1]
    elif case == "keys":
        value = value[:, :, :10]
    elif case == "padding":
        ranges = KeyRanges(20, first=torch.tensor([3]))
    else:
        query = query[:, :3]
    reason = attention._elsewhere(query, key, value, ranges, 0.0, None, {})
    assert reason == "its states are not of the same sequences and heads"


# models


def test_a_copy_computes_on_the_threads_of_the_original() -> None:
    model = build("qwen3_moe")
    pool = PoolConfig(1)
    assert use_attention(model, pool)
    for each in (model, copy.deepcopy(model)):
        module = each.model.layers[0].self_attn
        assert attention._decoder(module, 16, 16).attention.pool == pool


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_model_of_a_forked_child() -> None:
    """One that is loaded there has threads there, though the parent had attention of its sizes."""
    made, _, _ = states(Problem(1, 2, 2, 1, 20, 32, 32))
    with torch.no_grad():
        expected, _ = attention_forward(torch.nn.Identity(), *made, KeyRanges(20))
        child = os.fork()
        if not child:
            status = 1
            try:
                out, _ = attention_forward(torch.nn.Identity(), *made, KeyRanges(20))
                status = 0 if torch.equal(out, expected) else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def without_routing(family: str) -> Any:
    """A model in which every token takes every expert: roundings choose nothing."""
    model = build(family)
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "num_experts"):
            module.top_k = module.num_experts
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_generate(family: str) -> None:
    ours, theirs = build(family), build(family)
    assert use_attention(ours, POOL)
    use_cache(ours)
    assert greedy(ours, prompt()) == greedy(theirs, prompt())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_logits_step_by_step(family: str) -> None:
    """A padded batch past the window of 16: prefill, single steps, then several tokens at once.

    Both implementations round differently; each is held against the model in float32, and ours
    must be as good as the eager one, whose error is what a bf16 model of this size has.
    """
    theirs = without_routing(family)
    theirs.set_attn_implementation("eager")
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).float()
    ours.config = copy.deepcopy(theirs.config)
    ours.set_attn_implementation(theirs._check_and_adjust_attn_implementation(None))
    assert use_attention(ours, POOL)
    ids = torch.cat([prompt(48), prompt(48) + 3]) % 128
    real = torch.ones_like(ids)
    real[0, :5] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    reference = exact(ids, attention_mask=real, position_ids=positions).logits
    errors = []
    for model in (ours, theirs):
        cache = grow(growing_cache(model.config))
        worst = 0.0
        for begin, end in ((0, 20), *((i, i + 1) for i in range(20, 40)), (40, 48)):
            logits = model(
                ids[:, begin:end], attention_mask=real[:, :end], past_key_values=cache,
                position_ids=positions[:, begin:end], use_cache=True,
            ).logits  # fmt: skip
            difference = (logits - reference[:, begin:end]).abs() * real[:, begin:end, None]
            worst = max(worst, float(difference.max()))
        errors.append(worst / float(reference.abs().max()))
    assert errors[0] <= 1.5 * errors[1]
    assert errors[1] < 0.05


def test_beams() -> None:
    """The scores of the best beams are what one forward pass without a cache gives for them."""
    model = without_routing("gpt_oss")
    assert use_attention(model, POOL)
    use_cache(model)
    ids = torch.cat([prompt(30), prompt(30) + 2]) % 128
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=4, max_new_tokens=8, pad_token_id=0,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(found.sequences).logits[:, 29:-1].float()
    chosen = logits.log_softmax(-1).gather(2, found.sequences[:, 30:, None])
    assert torch.allclose(chosen.mean((1, 2)), found.sequences_scores, atol=0.03)


def test_models_that_keep_their_attention(caplog: pytest.LogCaptureFixture) -> None:
    chosen = build("qwen3_moe")
    chosen.set_attn_implementation("eager")
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        assert not use_attention(build("deepseek_v4"), POOL)
        assert not use_attention(chosen, POOL)
        assert not use_attention(torch.nn.Linear(2, 2), POOL)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "attention stays as it is"
    ] * 3
    assert "needs masks as tensors" in caplog.text
    assert "'eager'" in caplog.text
    assert chosen.config._attn_implementation == "eager"


@pytest.mark.parametrize("how", ["compile", "make_fx"])
def test_captured_graphs_have_sdpa(how: str) -> None:
    """A graph that has captured one call computes another: no address is part of it."""
    p = Problem(1, 2, 2, 6, 6, 16, 16)
    module = Module(p)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_forward(module, q, k, v, None)[0]

    with torch.no_grad():
        if how == "compile":
            run = torch.compile(call, backend="eager", fullgraph=True)
        else:
            run = make_fx(call)(*states(p, seed=1)[0])
        made, _, _ = states(p)
        expected, bound = evaluate(p, made, KeyRanges(6), None)
        assert ((run(*made).double() - expected).abs() <= 2 * bound).all()
