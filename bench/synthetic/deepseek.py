"""DeepSeek-V4-Flash's experts and routers: a few layers of it, as published.

Dimensions, names and dtypes are those of deepseek-ai/DeepSeek-V4-Flash on the hub. Attention is
left out: these checkpoints are for the experts' part alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybrid_moe.loaders.writer import PlannedTensor
from synthetic.models import GROUP, Synthetic, Tensor


def expert_tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Each expert for itself: `weight` I8 [N, K/2], two codes a byte, `scale` E8M0 [N, K/32]."""
    H, I, E = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    for number in range(config["num_hidden_layers"]):
        layer = f"layers.{number}.ffn"
        yield Tensor(PlannedTensor(f"{layer}.gate.weight", "BF16", (E, H)), "normal", H**-0.5)
        for expert in range(E):
            for name, N, K in (("w1", I, H), ("w3", I, H), ("w2", H, I)):
                stem = f"{layer}.experts.{expert}.{name}"
                yield Tensor(PlannedTensor(f"{stem}.weight", "I8", (N, K // 2)), "codes")
                scales = PlannedTensor(f"{stem}.scale", "F8_E8M0", (N, K // GROUP))
                yield Tensor(scales, "scales", K**-0.5)


def flash_layers(layers: int, **sizes: int) -> Synthetic:
    """So many of its layers; 3.4 GB each, unless `sizes` are others."""
    config = {
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "expert_dtype": "fp4",
        "num_hidden_layers": layers,
        **sizes,
    }
    return Synthetic(f"deepseek-v4-flash-{layers}-layers", config, expert_tensors)
