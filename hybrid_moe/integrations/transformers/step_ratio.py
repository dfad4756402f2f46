"""How much longer a step of several tokens is, by the timeline, where nothing was measured yet.

Rates are assumed, those of `schedule.streamed_prefill`: only ratios of these times mean something.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrid_moe.formats.strips import packed_nbytes
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear
from hybrid_moe.integrations.transformers.dense.mlp import HybridMLP
from hybrid_moe.integrations.transformers.dense.packing import nbytes_of
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.split_experts import SplitExperts
from hybrid_moe.loaders.model_config import TOP_K, ModelConfig
from hybrid_moe.schedule.layer_times import LayerTimes, layer_times
from hybrid_moe.schedule.layer_work import (
    ExpertSplit,
    ExpertWork,
    GpuAmount,
    LayerWork,
    uniform_met,
)
from hybrid_moe.schedule.streamed_prefill import ASSUMED, ASSUMED_MACS
from hybrid_moe.schedule.timeline import run_step


def step_seconds(model: Any, tokens: int) -> float:
    """Of a step with so many tokens, nothing in the cache; experts are equally likely.

    Args:
        model: of Transformers, its experts packed or absent.
    """
    experts = [module for module in model.modules() if isinstance(module, HybridExperts)]
    rate = ASSUMED.cpu_read if model.device.type == "cpu" else ASSUMED.gpu_read
    config = ModelConfig(model.config.to_dict(), "the configuration")
    rest = LayerTimes(-1, before=dense_nbytes(model) / rate, routed=False)
    times = [_layer_times(module, number, config, tokens) for number, module in enumerate(experts)]
    return run_step([rest, *times]).seconds


def dense_nbytes(model: Any) -> int:
    """Bytes that each token reads beside routed experts; embeddings are looked up."""
    embedding = model.get_input_embeddings()

    def read(module: torch.nn.Module) -> int:
        if module is embedding or isinstance(module, HybridExperts):
            return 0
        if isinstance(module, (HybridMLP, HybridLinear)):
            return nbytes_of(module)
        own = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        return own + sum(read(child) for child in module.children())

    return read(model)


def _layer_times(
    module: HybridExperts, number: int, config: ModelConfig, tokens: int
) -> LayerTimes:
    spec, formats = module.spec, module.formats
    assert formats is not None
    nbytes, count = packed_nbytes(formats, spec.hidden, spec.intermediate), spec.num_experts
    expert = ExpertWork(nbytes, nbytes, 3 * spec.hidden * spec.intermediate, *ASSUMED_MACS)
    layer = module.layer
    hot = layer.wrapper.num_gpu_experts if isinstance(layer, SplitExperts) else 0
    # where nothing says how many experts a token takes, one: n tokens then meet nearly n
    k = config.of_layer(TOP_K, number) or 1
    met = ExpertSplit(
        hot=uniform_met(hot, count, k, tokens), cpu=uniform_met(count - hot, count, k, tokens)
    )
    return layer_times(LayerWork(number, GpuAmount(), expert=expert), met, ASSUMED)
