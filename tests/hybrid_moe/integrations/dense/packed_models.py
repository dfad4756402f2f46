"""Tiny models of Transformers whose linear layers are packed by hand."""

from __future__ import annotations

from typing import Any

import torch

from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.table import BF16
from hybrid_moe.integrations.transformers.dense.hybrid_linear import HybridLinear, share_inputs


def pack(model: Any, threads: int = 1) -> Any:
    """`model` with every `torch.nn.Linear` of at least 64 outputs packed as BF16, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module.out_features < 64:
            continue
        biased = module.bias is not None
        rows, inputs = module.weight.shape
        matrix = PackedMatrix(BF16, rows, inputs, PoolConfig(threads), bias=biased)
        layer = HybridLinear(matrix, name, module.weight.dtype)
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer)
    share_inputs(model)
    return model.eval()
