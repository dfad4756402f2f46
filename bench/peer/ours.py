"""hybrid_moe, through the layer that its wrapper uses."""

from __future__ import annotations

from harness import make_layer
from problem import Array, Batch, Shape, bf16_values
from weights import format_of

from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from peer.interface import Peer, UnavailableError


class Ours(Peer):
    def __init__(self, shape: Shape, method: str, threads: int, max_tokens: int) -> None:
        if not has_kernels(format_of(method)):
            raise UnavailableError(f"there are no kernels of {format_of(method).name}")
        self._layer = make_layer(shape, method, PoolConfig(threads), plain=True)

    @property
    def label(self) -> str:
        bits = "" if self._layer.activation_bits == 16 else ", int8 activations"
        return f"hybrid_moe ({self._layer.tier.name}{bits})"

    def prepare(self, batches: list[Batch]) -> None:
        self._batches = batches

    def call(self, index: int) -> None:
        batch = self._batches[index]
        self._y = self._layer.forward(batch.x, batch.ids, batch.weights)

    def output(self) -> Array:
        return bf16_values(self._y)
