"""The kernels for graphs and other people's models: operators of torch, `hybrid_moe::gpu_...`.

Each function takes and returns what the kernel's own function does, which has the description, and
is one node of a graph with a shape rule (its fake). On CUDA tensors an operator launches kernels,
elsewhere it runs their references. Code of this package that is itself inside an operator calls the
kernels' functions directly: dispatching an operator costs some 5 us.

| function | see |
|---|---|
| `pack`, `gate_up`, `down`, `combine` | `pack_tokens`, `gate_up`, `down`, `combine` |
| `gating_topk`, `gating_switch`, `gating_soft` | the modules of these names; `gating` |
| `act_quant`, `weight_dequant` | the modules of these names |
"""

from hybrid_moe.gpu_kernels.ops.expert_ops import combine, down, gate_up, pack
from hybrid_moe.gpu_kernels.ops.router_ops import (
    act_quant,
    gating_soft,
    gating_switch,
    gating_topk,
    weight_dequant,
)

__all__ = [
    "act_quant",
    "combine",
    "down",
    "gate_up",
    "gating_soft",
    "gating_switch",
    "gating_topk",
    "pack",
    "weight_dequant",
]
