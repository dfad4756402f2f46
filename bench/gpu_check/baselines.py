"""What others take for both GEMMs and the activation, on the same batches and weights.

* torch: cuBLAS for each expert in use, weights in BF16 whatever our format is. The ids are known to
  the host and the launches are in a graph: better than it could be in use.
* Triton: one kernel for all experts (`triton_moe`), MXFP4 through `tl.dot_scaled`. Where Triton is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from bench.gpu_check.clock import on_gpu, time_us
from bench.gpu_check.workload import Batch, Model
from hybrid_moe.formats.activation import Activation
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.slot_weights import slot_weights

Tensor = torch.Tensor

SOURCES = 8
"""Experts whose weights are unpacked; the others repeat them, at addresses of their own."""


def swiglu(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The activation in the dtype of its inputs."""
    limit, alpha, offset = activation.parameters
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + offset)


class TorchExperts:
    """cuBLAS for each expert. Weights: BF16 [E, 2I, H] and [E, H, I]."""

    def __init__(self, layout: SlotLayout, model: Model, memory: Tensor) -> None:
        unpacked = [slot_weights(layout, slot) for slot in memory[:SOURCES]]
        order = [e % len(unpacked) for e in range(model.experts)]
        both = torch.stack([torch.cat([w.gate, w.up]).bfloat16() for w in unpacked])
        down = torch.stack([w.down.bfloat16() for w in unpacked])
        self.gate_up, self.down, self.model = both[order], down[order], model

    def call(self, batch: Batch) -> Callable[[], object]:
        """The layer on a batch, whose ids are read now."""
        ids = batch.ids.flatten()
        groups = [
            (expert, (ids == expert).nonzero().flatten() // self.model.top_k)
            for expert in ids.unique().tolist()
        ]

        def run() -> list[Tensor]:
            rows = []
            for expert, tokens in groups:
                gate, up = (batch.x[tokens] @ self.gate_up[expert].T).chunk(2, dim=-1)
                rows.append(swiglu(self.model.activation, gate, up) @ self.down[expert].T)
            return rows

        return run


class Baselines:
    """What a layer's batches are compared with. Its weights are made once: as many bytes again as
    the slots have, or four times as many."""

    def __init__(self, layout: SlotLayout, model: Model, memory: Tensor) -> None:
        self._layout, self._model = layout, model
        self._torch = TorchExperts(layout, model, memory)
        self._triton: list[tuple[Tensor, Tensor]] | None = None
        if on_gpu() and importlib.util.find_spec("triton") is not None:
            from bench.gpu_check import triton_moe

            self._triton = triton_moe.weights(layout, model, memory)

    def measured(self, batches: Sequence[Batch]) -> dict[str, float | None]:
        """Baseline -> microseconds; None where it was not measured."""
        calls = [self._torch.call(batch) for batch in batches]
        return {
            "torch gate_up + down": time_us(calls, replays=3),
            "triton gate_up + down": self._triton_us(batches),
        }

    def _triton_us(self, batches: Sequence[Batch]) -> float | None:
        """The best of its configurations; one that this Triton cannot compile is left out."""
        if self._triton is None:
            return None
        from bench.gpu_check import triton_moe

        times = []
        for config in triton_moe.CONFIGS:
            try:
                calls = triton_moe.calls(self._layout, self._model, batches, self._triton, config)
                times.append(time_us(calls, replays=3))
            except Exception as error:
                print(f"triton {config}: {type(error).__name__}: {error}"[:300])
        return min((time for time in times if time is not None), default=None)
