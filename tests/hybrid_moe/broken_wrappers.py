"""Implementations that break one clause of the contract each, to show that the kit notices."""

from __future__ import annotations

import os
from typing import Any

import torch

from hybrid_moe.wrapper import KTMoEWrapper


class KeepsReferences(KTMoEWrapper):
    """Reads the inputs when it is synced."""

    def submit_forward(self, *arguments: Any) -> None:
        self._kept = arguments

    def sync_forward(self, hidden: Any, cuda_stream: Any = None) -> torch.Tensor:
        super().submit_forward(*self._kept)
        return super().sync_forward(hidden, cuda_stream)


class NormalizesWeights(KTMoEWrapper):
    """Divides routing weights by their sum."""

    def submit_forward(self, x: Any, ids: Any, weights: Any, stream: Any = None) -> None:
        super().submit_forward(x, ids, weights / weights.sum(1, keepdim=True), stream)


class WrapsIds(KTMoEWrapper):
    """Takes ids modulo E, as indexing from the end does."""

    def submit_forward(self, x: Any, ids: Any, weights: Any, stream: Any = None) -> None:
        super().submit_forward(x, ids % self.num_experts, weights, stream)


class ForgetsTheMap(KTMoEWrapper):
    """Loads expert i as id i."""

    def load_weights(self, physical_to_logical_map_cpu: Any = None) -> None:
        super().load_weights(None)


class HasOneResultForAll(KTMoEWrapper):
    """All layers answer in one buffer."""

    _buffer = torch.zeros(1, dtype=torch.bfloat16)

    def sync_forward(self, hidden: Any, cuda_stream: Any = None) -> torch.Tensor:
        output = super().sync_forward(hidden, cuda_stream)
        return HasOneResultForAll._buffer.resize_(output.shape).copy_(output)


class FreezesTheMask(KTMoEWrapper):
    """Hands out a copy of the mask."""

    @property  # type: ignore[misc]
    def gpu_experts_mask(self) -> torch.Tensor:
        return self._mask.clone()


class DropsDeferred(KTMoEWrapper):
    """Loses what it deferred."""

    def submit_forward(self, x: Any, ids: Any, weights: Any, stream: Any = None) -> None:
        protected = self.num_experts_per_tok - self.max_deferred_experts_per_token
        ids, _ = self.select_deferred_experts(ids, weights, protected)
        super().submit_forward(x, ids, weights, stream)


class IgnoresTheClamp(KTMoEWrapper):
    """Accepts swiglu_limit and forgets it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "swiglu_limit": 0.0})


class ClearsWhatIsUnderWay(KTMoEWrapper):
    """`clear_buffer_cache` frees the buffers of submissions as well."""

    _cleared = False

    def submit_forward(self, *arguments: Any) -> None:
        ClearsWhatIsUnderWay._cleared = False
        super().submit_forward(*arguments)

    @staticmethod
    def clear_buffer_cache() -> None:
        ClearsWhatIsUnderWay._cleared = True

    def sync_forward(self, hidden: Any, cuda_stream: Any = None) -> torch.Tensor:
        output = super().sync_forward(hidden, cuda_stream)
        return output.zero_() if ClearsWhatIsUnderWay._cleared else output


class SwallowsErrors(KTMoEWrapper):
    """Answers a bad call with zeros."""

    def submit_forward(self, *arguments: Any) -> None:
        try:
            super().submit_forward(*arguments)
        except (TypeError, ValueError, AttributeError):
            self._shape = arguments[0]

    def sync_forward(self, hidden: Any, cuda_stream: Any = None) -> torch.Tensor:
        try:
            return super().sync_forward(hidden, cuda_stream)
        except (RuntimeError, TypeError, ValueError):
            return torch.zeros(1)


class Crashes(KTMoEWrapper):
    """Takes the process with it where -1 occurs."""

    def submit_forward(self, x: Any, ids: Any, weights: Any, stream: Any = None) -> None:
        if bool((ids < 0).any()):
            os.abort()
        super().submit_forward(x, ids, weights, stream)
