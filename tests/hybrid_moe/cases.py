"""Random layers, batches and wrappers for the wrapper's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import format_named
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.wrapper import KTMoEWrapper
from tests.reference import Evaluation, evaluate

SIZES = {
    "layer_idx": 0,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
}
E, K, H, I = 8, 3, 64, 96


@dataclass
class Weights:
    """Weights of one layer as floats, and as what is left of them in a format."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, seed: int = 0, bias: bool = False, experts: int = E) -> Weights:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng)

        up_down = (normal(experts, I, H) / H**0.5, normal(experts, I, H) / H**0.5)
        weights = cls(*up_down, normal(experts, H, I) / I**0.5)
        if bias:
            weights.biases = {
                "gate_bias": normal(experts, I),
                "up_bias": normal(experts, I),
                "down_bias": normal(experts, H),
            }
        return weights

    def load(self, wrapper: KTMoEWrapper, mapping: torch.Tensor | None = None) -> KTMoEWrapper:
        wrapper.load_weights_from_tensors(self.gate, self.up, self.down, mapping, **self.biases)
        return wrapper

    def quantized(self, name: str, fmt: WeightFormat) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes and scales of "gate", "up" or "down", stacked over experts."""
        w = getattr(self, name).numpy()
        codes, scales = fmt.encode(w.reshape(-1, w.shape[-1]))
        stack = (w.shape[0], w.shape[1], -1)
        return codes.reshape(stack), None if scales is None else scales.reshape(stack)

    def expected(
        self, batch: Batch, method: str | LayerFormats = "MXFP4", **options: Any
    ) -> Evaluation:
        """The contract's output for `batch`, of a method with one format or of these formats."""
        first, second = layer_formats(format_named(method)) if isinstance(method, str) else method
        dequantized = [
            np.stack([fmt.dequantize(*fmt.encode(w)) for w in getattr(self, name).numpy()])
            for name, fmt in (("gate", first), ("up", first), ("down", second))
        ]
        biases: dict[str, Any] = {name: bias.numpy() for name, bias in self.biases.items()}
        return evaluate(
            batch.hidden.double().numpy(),
            batch.ids.numpy(),
            batch.weights.float().numpy(),
            *dequantized,
            **biases,
            **options,
        )

    def save(self, folder: Path, layer: int = 0) -> Path:
        """As an MXFP4 checkpoint under DeepSeek-V4's published names."""
        from safetensors.torch import save_file

        tensors = {}
        for name, projection in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            codes, scales = self.quantized(projection, MXFP4)
            assert scales is not None
            for e in range(len(codes)):
                key = f"layers.{layer}.ffn.experts.{e}.{name}"
                tensors[f"{key}.weight"] = torch.from_numpy(codes[e].copy()).view(torch.int8)
                tensors[f"{key}.scale"] = torch.from_numpy(scales[e].copy()).view(
                    torch.float8_e8m0fnu
                )
        save_file(tensors, folder / "model.safetensors")
        return folder


@dataclass
class Batch:
    """hidden [B, H] bfloat16, ids [B, k], weights [B, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, tokens: int = 5, seed: int = 1, experts: int = E) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        order = torch.rand(tokens, experts, generator=rng).argsort(dim=1)
        return cls(
            torch.randn(tokens, H, generator=rng).to(torch.bfloat16),
            order[:, :K].contiguous(),
            torch.rand(tokens, K, generator=rng) + 0.1,
        )

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights


def wrapper(**arguments: Any) -> KTMoEWrapper:
    """A wrapper of `SIZES` on one thread; `arguments` override."""
    return KTMoEWrapper(**{**SIZES, "cpuinfer_threads": 1, "threadpool_count": 1, **arguments})
