"""Choosing experts by their logits: one kernel for all routers that take the k best.

`gating.py` has the table of what they do; the kernel is compiled for one row of it. A warp takes a
token: a lane holds experts lane, lane + 32, ... in registers, as unsigned integers in the order of
their values, so that one `redux.sync` finds the best of all and a second one the lowest id that has
it. Nothing is sorted, nothing lies in shared memory, and the choice needs no branches.
"""

# The DSL evaluates annotations in the module's globals: they must not be strings.

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.gating import MOST_EXPERTS, SCORINGS, Gating, Scoring
from hybrid_moe.gpu_kernels.toolchain import launch

Tensor = torch.Tensor


@dataclass(frozen=True)
class GatingConfig:
    """What the kernel is compiled for.

    Attributes:
        gating: see there.
        experts: E.
        logits: their type, "f32" or "bf16".
        rounds: the model's dtype is bf16, so that values are rounded as its row of `SCORINGS` says.
        biased: a bias is added to the scores before the choice.
        bias_rounds: that sum is rounded too.
        warps: of a block; a warp takes one token.
    """

    gating: Gating
    experts: int
    logits: str
    rounds: bool
    biased: bool
    bias_rounds: bool
    warps: int


def choose_config(
    gating: Gating,
    experts: int,
    logits: torch.dtype,
    tokens: int,
    bias: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> GatingConfig:
    """One warp a block while there are fewer tokens than a large GPU has room for in blocks of one
    warp (132 SMs, 32 blocks each: 4224), so that tokens spread over SMs; beyond that four, since an
    SM's 32 blocks must have 2 warps or more to fill its 64."""
    rounds = (dtype or logits) == torch.bfloat16
    return GatingConfig(
        gating,
        experts,
        "bf16" if logits == torch.bfloat16 else "f32",
        rounds,
        bias is not None,
        rounds and SCORINGS[gating.scoring].rounding == "steps" and bias == torch.bfloat16,
        warps=1 if tokens <= 4096 else 4,
    )


@functools.cache
def definition(config: GatingConfig) -> KernelDefinition:
    """The kernel. Grid: ceil(T / warps) blocks."""
    return KernelDefinition(
        "gating_topk",
        config,
        _kernel,
        (
            Argument("logits", config.logits, 2 if config.logits == "bf16" else 4),  # [T, E]
            Argument("bias", "f32", 4),  # [E]; not read unless biased
            Argument("ids", "i32", 4),  # [T, k]
            Argument("weights", "f32", 4),  # [T, k]
            Argument("tokens", "i32"),
        ),
        threads=32 * config.warps,
    )


def _kernel(config: GatingConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64, Uint32, const_expr, range_constexpr

    scoring = SCORINGS[config.gating.scoring]
    E, K = config.experts, config.gating.top_k
    held = -(-E // 32)  # experts of a lane: lane, lane + 32, ...
    groups, size = config.gating.groups, E // config.gating.groups
    steps = config.rounds and scoring.rounding == "steps"
    round_weights = config.rounds and scoring.rounding == "weights"

    @cute.jit
    def ordered(value: Float32) -> Uint32:
        """Unsigned integers in the order of the values; both zeros alike, NaN above all. 0 is below
        all: an expert that is none, or taken."""
        bits = (value + Float32(0.0)).bitcast(Uint32)
        flip = Uint32(0x80000000)
        if bits >> Uint32(31) != Uint32(0):
            flip = Uint32(0xFFFFFFFF)
        key = bits ^ flip
        if value != value:
            key = Uint32(0xFFFFFFFF)
        return key

    @cute.jit
    def value_of(key: Uint32) -> Float32:
        flip = Uint32(0x80000000)
        if key >> Uint32(31) == Uint32(0):
            flip = Uint32(0xFFFFFFFF)
        return (key ^ flip).bitcast(Float32)

    @cute.jit
    def rounded(value: Float32, yes: cutlass.Constexpr) -> Float32:
        if const_expr(yes):
            value = value.to(cutlass.BFloat16).to(Float32)
        return value

    @cute.jit
    def warp_sum(value: Float32) -> Float32:
        for step in range_constexpr(5):
            value = value + cute.arch.shuffle_sync_bfly(value, 1 << step)
        return value

    @cute.jit
    def load(line: cute.Pointer, values: cute.Tensor, lane: Int32) -> None:
        """The lane's part of a line [E]; -inf, which adds nothing to a softmax, behind its end."""
        source = cute.make_tensor(line, cute.make_layout(E))
        for i in range_constexpr(held):
            if const_expr(32 * (i + 1) <= E):
                values[i] = source[lane + 32 * i].to(Float32)
            else:
                values[i] = Float32(-float("inf"))
                if lane + 32 * i < E:
                    values[i] = source[lane + 32 * i].to(Float32)

    @cute.jit
    def score_of(logit: Float32) -> Float32:
        """Of the functions that look at one logit alone."""
        score = logit
        if const_expr(scoring.function == "sigmoid"):
            score = Float32(1.0) / (Float32(1.0) + cute.math.exp(-logit))
        if const_expr(scoring.function == "sqrtsoftplus"):
            soft = cute.math.log1p(cute.math.exp(logit))
            if logit > Float32(20.0):  # torch's threshold
                soft = logit
            score = rounded(cute.math.sqrt(rounded(soft, steps)), steps)
        return score

    @cute.jit
    def kept(keys: cute.Tensor, lane: Int32) -> Uint32:
        """The groups whose experts may be chosen, one bit each."""
        mine = Uint32(0)  # lane g: the score of group g
        for group in cutlass.range(0, groups):
            first, second = Uint32(0), Uint32(0)
            for i in range_constexpr(held):
                if (lane + 32 * i) // size == group:
                    key = keys[i]
                    if key > first:
                        second = first
                        first = key
                    elif key > second:
                        second = key
            best = cute.arch.warp_redux_sync(first, "max")
            holder = Int32(32)
            if first == best:
                holder = lane
            if cute.arch.warp_redux_sync(holder, "min") == lane:
                first = second
            other = cute.arch.warp_redux_sync(first, "max")
            score = ordered(value_of(best) + value_of(other))
            if lane == group:
                mine = score
        above = Int32(0)  # groups with a larger score, or as large and of a lower number
        for group in cutlass.range(0, groups):
            score = cute.arch.shuffle_sync(mine, group)
            if score > mine or (score == mine and group < lane):
                above = above + 1
        bit = Uint32(0)
        if lane < groups and above < config.gating.kept_groups:
            bit = Uint32(1) << Uint32(lane)
        return cute.arch.warp_redux_sync(bit, "or")

    class GatingTopk:
        @cute.kernel
        def kernel(
            self,
            logits: cute.Pointer,
            bias: cute.Pointer,
            ids: cute.Pointer,
            weights: cute.Pointer,
            tokens: Int32,
        ) -> None:
            thread = cute.arch.thread_idx()[0]
            lane = thread % 32
            token = cute.arch.block_idx()[0] * config.warps + thread // 32
            if token < tokens:
                keys = cute.make_rmem_tensor(cute.make_layout(held), Uint32)
                scores = cute.make_rmem_tensor(cute.make_layout(held), Float32)
                biases = cute.make_rmem_tensor(cute.make_layout(held), Float32)
                load(logits + Int64(token) * E, scores, lane)  # all loads before the first use
                if const_expr(config.biased):
                    load(bias, biases, lane)
                largest = Uint32(0)
                for i in range_constexpr(held):
                    scores[i] = score_of(scores[i])
                    choice = scores[i]
                    if const_expr(config.biased):
                        choice = rounded(choice + biases[i], config.bias_rounds)
                    keys[i] = ordered(choice)
                    if const_expr(32 * (i + 1) > E):  # noqa: SIM102
                        if lane + 32 * i >= E:
                            keys[i] = Uint32(0)
                    if keys[i] > largest:
                        largest = keys[i]
                total = Float32(1.0)
                if const_expr(scoring.function == "softmax"):
                    most = value_of(cute.arch.warp_redux_sync(largest, "max"))
                    total = Float32(0.0)
                    for i in range_constexpr(held):
                        scores[i] = cute.math.exp(scores[i] - most)
                        total = total + scores[i]
                    total = warp_sum(total)
                    if const_expr(scoring.by_score):
                        for i in range_constexpr(held):
                            scores[i] = rounded(scores[i] / total, steps)
                            if keys[i] != Uint32(0):
                                keys[i] = ordered(scores[i])
                if const_expr(groups > 1):
                    bits = kept(keys, lane)
                    for i in range_constexpr(held):
                        group = Uint32((lane + 32 * i) // size) & Uint32(31)
                        if (bits >> group) & Uint32(1) == Uint32(0):
                            keys[i] = Uint32(0)

                chosen, weight = Int32(0), Float32(0.0)  # lane j: the j-th choice
                for j in cutlass.range(0, K):
                    best, expert = Uint32(0), Int32(MOST_EXPERTS)
                    for i in range_constexpr(held):
                        if keys[i] > best:
                            best = keys[i]
                            expert = lane + 32 * i
                    if best != cute.arch.warp_redux_sync(best, "max"):
                        expert = Int32(MOST_EXPERTS)
                    winner = cute.arch.warp_redux_sync(expert, "min")
                    score = Float32(0.0)
                    for i in range_constexpr(held):
                        if lane + 32 * i == winner:
                            keys[i] = Uint32(0)
                            score = scores[i]
                    score = cute.arch.shuffle_sync(score, winner % 32)
                    if lane == j:
                        chosen = winner
                        weight = score

                if const_expr(scoring.function == "softmax" and not scoring.by_score):
                    weight = weight / total
                if const_expr(scoring.function == "softmax_of_chosen"):
                    weight = cute.math.exp(weight - cute.arch.shuffle_sync(weight, 0))
                if lane >= K:
                    weight = Float32(0.0)
                if const_expr(config.gating.renormalise or scoring.function == "softmax_of_chosen"):
                    whole = rounded(warp_sum(weight), steps)
                    if const_expr(scoring.epsilon > 0.0):
                        whole = rounded(whole + Float32(scoring.epsilon), steps)
                    weight = rounded(weight / whole, steps)
                if const_expr(config.gating.scaling != 1.0):
                    weight = rounded(weight * Float32(config.gating.scaling), steps)
                weight = rounded(weight, round_weights)
                if lane < K:
                    out = Int64(token) * K + lane
                    cute.make_tensor(ids + out, cute.make_layout(1))[0] = chosen
                    cute.make_tensor(weights + out, cute.make_layout(1))[0] = weight

        @cute.jit
        def __call__(
            self,
            logits: cute.Pointer,
            bias: cute.Pointer,
            ids: cute.Pointer,
            weights: cute.Pointer,
            tokens: Int32,
            stream: Any,
        ) -> None:
            self.kernel(logits, bias, ids, weights, tokens).launch(
                grid=[1, 1, 1], block=[32 * config.warps, 1, 1], stream=stream
            )

    return GatingTopk()


def gating_topk_ref(
    logits: Tensor, gating: Gating, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`gating_topk` in torch: the operations of the models' routers, in their order and dtypes, but
    for the choice among equal values."""
    _check(logits, gating, bias, dtype)
    dtype, scoring = dtype or logits.dtype, SCORINGS[gating.scoring]
    scores = _scores(logits, scoring, dtype)
    choice = (scores if scoring.by_score else logits).detach()
    order = _descending(choice if bias is None else choice + bias, gating)
    ids = order[:, : gating.top_k]
    weights = scores.gather(1, ids)
    if scoring.function == "softmax_of_chosen":
        weights = weights.softmax(-1)
    elif gating.renormalise:
        whole = weights.sum(-1, keepdim=True)
        weights = weights / (whole + scoring.epsilon if scoring.epsilon else whole)
    if gating.scaling != 1.0:
        weights = weights * gating.scaling
    if scoring.rounding != "never":
        weights = weights.to(dtype)
    return ids.int(), weights.float()


def _scores(logits: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    """Of all experts, [T, E]; of `softmax_of_chosen` the logits."""
    steps = dtype if scoring.rounding == "steps" else torch.float32
    if scoring.function == "softmax":
        return logits.softmax(-1, dtype=torch.float32).to(steps)
    if scoring.function == "softmax_of_chosen":
        return logits.float()
    if scoring.function == "sigmoid":
        return logits.float().sigmoid()
    return F.softplus(logits.to(steps)).sqrt()


def _descending(choice: Tensor, gating: Gating) -> Tensor:
    """Ids [T, E] by value, the largest first; those of groups that are not kept last."""
    order = choice.argsort(dim=-1, descending=True, stable=True)
    if gating.groups == 1:
        return order
    grouped = choice.view(len(choice), gating.groups, -1)
    of_groups = grouped.topk(2, dim=-1).values.sum(-1)
    kept = of_groups.argsort(dim=-1, descending=True, stable=True)[:, : gating.kept_groups]
    dropped = torch.ones_like(of_groups, dtype=torch.int8).scatter_(1, kept, 0)
    dropped = dropped.repeat_interleave(grouped.shape[-1], dim=1)
    return order.gather(1, dropped.gather(1, order).argsort(dim=-1, stable=True))


def gating_topk(
    logits: Tensor, gating: Gating, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: float32 or bf16 [T, E], contiguous.
        gating: what becomes of them.
        bias: float32 or bf16 [E], added to the scores for the choice alone; not to a softmax.
        dtype: the model's, float32 or bf16, to which values are rounded as `SCORINGS` says; None
            for that of the logits.

    Returns:
        ids: int32 [T, k], the best first.
        weights: float32 [T, k]; where they are rounded, their values are those of `dtype`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(logits, gating, bias, dtype)
    if not logits.is_cuda:
        return gating_topk_ref(logits, gating, bias, dtype)
    return _launched(logits, gating, bias, dtype)


def _launched(
    logits: Tensor, gating: Gating, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    config = choose_config(
        gating, experts, logits.dtype, tokens, None if bias is None else bias.dtype, dtype
    )
    ids = logits.new_empty(tokens, gating.top_k, dtype=torch.int32)
    weights = logits.new_empty(tokens, gating.top_k, dtype=torch.float32)
    values = (logits, None if bias is None else bias.float(), ids, weights, tokens)
    launch(definition(config), values, -(-tokens // config.warps))
    return ids, weights


def _check(logits: Tensor, gating: Gating, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    floats = (torch.float32, torch.bfloat16)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {list(logits.shape)}, must be [tokens, experts]")
    if logits.dtype not in floats:
        raise TypeError(f"logits are {logits.dtype}, must be float32 or bfloat16")
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    if dtype is not None and dtype not in floats:
        raise TypeError(f"dtype is {dtype}, must be float32 or bfloat16")
    gating.check(logits.shape[1])
    if bias is None:
        return
    if SCORINGS[gating.scoring].function.startswith("softmax"):
        raise ValueError(f"bias: routers of the kind {gating.scoring} have none")
    if bias.dtype not in floats:
        raise TypeError(f"bias is {bias.dtype}, must be float32 or bfloat16")
    if bias.shape != logits.shape[1:] or bias.device != logits.device:
        raise ValueError(
            f"bias has shape {list(bias.shape)} on {bias.device}, must be [{logits.shape[1]}] on "
            f"{logits.device}"
        )
    if not bias.is_contiguous():
        raise ValueError("bias must be contiguous")
