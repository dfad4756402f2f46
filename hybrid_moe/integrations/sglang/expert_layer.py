"""What SGLang says about an MoE layer, in the terms of `KTMoEWrapper`, or why it cannot run here.

SGLang passes kt-kernel sizes and a number of experts, nothing else: not the activation's clamp and
slope, not the true sizes where a GPU kernel pads them. All of it is on the layer and its runner
configuration. What this package does not compute is refused here, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid_moe.integrations.sglang.gpu_backend import VARIABLE

if TYPE_CHECKING:
    import torch


class UnsupportedLayerError(NotImplementedError):
    """A layer or server configuration that the `--kt-*` options cannot serve."""


@dataclass(frozen=True)
class ExpertLayerSpec:
    """One layer's routed experts.

    Attributes:
        num_experts: routed experts E.
        top_k: experts per token.
        hidden_size: H of the checkpoint; tensors of the layer may be padded beyond it.
        intermediate_size: I of the checkpoint, whole (not a tensor parallel part).
        swiglu_limit, swiglu_alpha: see `KTMoEWrapper`; 0 for none.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    swiglu_limit: float
    swiglu_alpha: float


def layer_spec(layer: Any, num_experts: int, intermediate_size: int | None) -> ExpertLayerSpec:
    """The specification of a `FusedMoE` whose weights are about to be created.

    Args:
        layer: the `FusedMoE`; its runner configuration exists already.
        num_experts: as given to `create_weights`.
        intermediate_size: I of the checkpoint as SGLang names it; None to derive it.

    Raises:
        UnsupportedLayerError: the activation, or something else of the layer.
    """
    limit, alpha = swiglu_of(layer.moe_runner_config)
    if intermediate_size is None:
        intermediate_size = layer.intermediate_size_per_partition * layer.moe_tp_size
    if layer.top_k is None:
        raise UnsupportedLayerError(
            f"--kt-*: layer {layer.layer_id} does not say how many experts a token has (its model "
            "routes outside of FusedMoE)"
        )
    return ExpertLayerSpec(
        num_experts=num_experts,
        top_k=layer.top_k,
        hidden_size=getattr(layer, "hidden_size_unpadded", layer.hidden_size),
        intermediate_size=intermediate_size,
        swiglu_limit=limit,
        swiglu_alpha=alpha,
    )


def swiglu_of(config: Any) -> tuple[float, float]:
    """(limit, alpha) of a `MoeRunnerConfig`; 0 stands for none.

    `swiglu_limit` (DeepSeek-V4) and `gemm1_clamp_limit` (gpt-oss) are the same clamp;
    `gemm1_alpha` selects gpt-oss's gate * sigmoid(alpha * gate) * (up + 1).

    Raises:
        UnsupportedLayerError: another activation.
    """

    def refuse(what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"--kt-*: layer {config.layer_id} has {what}; the experts on the CPU compute SwiGLU, "
            "clamped or not, with the routing weight on the output"
        )

    if config.activation != "silu":
        raise refuse(f'activation "{config.activation}"')
    if not config.is_gated:
        raise refuse("experts without a gate")
    if config.apply_router_weight_on_input:
        raise refuse("routing weights on the input")
    if config.no_combine:
        raise refuse("no_combine, which wants the experts' outputs apart")
    limits = {x for x in (config.swiglu_limit, config.gemm1_clamp_limit) if x}
    if len(limits) > 1:
        raise refuse(f"two clamps, {sorted(limits)}")
    alpha = config.gemm1_alpha or 0.0
    if config.gemm1_beta not in (None, 1.0 if alpha else 0.0):
        raise refuse(f"gemm1_beta {config.gemm1_beta}")
    return float(max(limits, default=0.0)), float(alpha)


def check_server(layer: Any) -> None:
    """Raise `UnsupportedLayerError` for a server configuration that would give wrong results."""
    from sglang.srt.layers.moe import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe = get_exec().moe
    problems = {
        f"--ep-size {layer.moe_ep_size}: use tensor parallelism only (--ep-size 1)": (
            layer.moe_ep_size > 1
        ),
        "--moe-dp-size above 1: each copy of the experts would need CPU memory of its own": (
            get_parallel().moe_dp_size > 1
        ),
        f"--moe-a2a-backend {get_moe_a2a_backend().value}: use none": (
            not get_moe_a2a_backend().is_none()
        ),
        "--enable-eplb: experts do not move once they are loaded": bool(moe.enable_eplb),
        "--ep-num-redundant-experts: the CPU has one copy of each expert": (
            bool(moe.ep_num_redundant_experts)
        ),
        "shared experts fused into the routed ones: add --disable-shared-experts-fusion": (
            bool(layer.num_fused_shared_experts)
        ),
        "--moe-runner-backend triton_kernel, whose routing does not tell which expert a token "
        "goes to: use triton or marlin": layer.use_triton_kernels,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedLayerError(f"--kt-*: layer {layer.layer_id} has " + "; ".join(found))


def check_graphs(backend: str | None, device: torch.device) -> None:
    """Raise `UnsupportedLayerError` where graphs would capture the torch back end on a GPU: it asks
    the GPU which experts have tokens, which no graph can hold."""
    from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled

    if backend == "torch" and device.type == "cuda" and not cuda_graph_fully_disabled():
        raise UnsupportedLayerError(
            f"{VARIABLE}=torch runs without graphs: add --cuda-graph-backend-decode disabled "
            f"--cuda-graph-backend-prefill disabled, or use {VARIABLE}=cute"
        )
