"""SGLang's weight loaders, for a GPU that holds some experts in slots.

SGLang's models hand every tensor of the checkpoint to the loader of the parameter it belongs to.
One call brings one expert (most families) or all of them stacked (gpt-oss and other fused
checkpoints). Experts that are not on the GPU are dropped, the others go to their slots; how a
tensor is cut, padded and laid out within a slot stays SGLang's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrid_moe.integrations.sglang.gpu_experts import GpuExperts

WeightLoader = Callable[..., None]


def slot_loader(layer: Any, experts: GpuExperts, original: WeightLoader) -> WeightLoader:
    """The `weight_loader` for the parameters of `layer`.

    Args:
        layer: the `FusedMoE`.
        experts: its experts on the GPU.
        original: the loader that SGLang gave the parameters: `FusedMoE.weight_loader` (called with
            an `expert_id`, which may be None) or `FusedMoE.weight_loader_fused` (called without).
    """

    def load(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        expert_id = kwargs.get("expert_id", args[0] if args else None)
        if expert_id is None:
            if experts.count:
                _check_not_packed(layer, param, loaded_weight, weight_name)
                rows = _hot_rows(layer, experts, loaded_weight, weight_name)
                original(param, rows, weight_name, shard_id, *args, **kwargs)
            return
        everywhere = getattr(param, "_sglang_require_global_experts", False)
        for physical in _physical_ids(layer, expert_id, everywhere):
            # A parameter that every rank has whole is indexed by id, the others by slot.
            at = physical if everywhere else experts.slot_of.get(physical)
            if at is not None:
                _check_not_packed(layer, param, loaded_weight, weight_name)
                layer._weight_loader_impl(
                    param=param,
                    loaded_weight=loaded_weight,
                    weight_name=weight_name,
                    shard_id=shard_id,
                    expert_id=at,
                )

    return load


def physical_to_logical(layer: Any, num_experts: int) -> torch.Tensor:
    """int64 [E] on the CPU: the checkpoint's expert behind each id of the router."""
    metadata = _location(layer)
    if metadata is None or layer.layer_id >= len(metadata.physical_to_logical_map_cpu):
        return torch.arange(num_experts)
    mapping: torch.Tensor = metadata.physical_to_logical_map_cpu[layer.layer_id]
    return mapping.to(torch.int64).contiguous()


def _check_not_packed(
    layer: Any, param: torch.nn.Parameter, loaded: torch.Tensor, weight_name: str
) -> None:
    """Codes of a quantized checkpoint must not be cast to weights."""
    if param.dtype.is_floating_point and loaded.dtype in (torch.uint8, torch.int8):
        raise ValueError(
            f"{weight_name} of layer {layer.layer_id} is {loaded.dtype} codes, but SGLang's method "
            f"for the experts on the GPU takes {param.dtype} weights: give the unquantized "
            "checkpoint as --model-path, or keep all experts on the CPU (--kt-num-gpu-experts 0)"
        )


def _hot_rows(
    layer: Any, experts: GpuExperts, stacked: torch.Tensor, weight_name: str
) -> torch.Tensor:
    """The rows of a stacked tensor [E, ...] in the order of the slots."""
    if stacked.shape[0] != experts.num_experts:
        raise ValueError(
            f"{weight_name} of layer {layer.layer_id} has {stacked.shape[0]} rows, "
            f"must have one for each of {experts.num_experts} experts"
        )
    logical = physical_to_logical(layer, experts.num_experts)[list(experts.hot)]
    return stacked[logical.to(stacked.device)]


def _physical_ids(layer: Any, logical: int, everywhere: bool) -> list[int]:
    """Router ids that lead to the checkpoint's expert `logical`."""
    metadata = _location(layer)
    if metadata is None:
        return [logical]
    ids: list[int] = metadata.logical_to_all_physical(layer.layer_id, logical, everywhere)
    return ids


def _location(layer: Any) -> Any:
    """SGLang's table of expert locations; None where a layer or model has none."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata() if layer.uses_expert_location else None
