"""Where a layer's weights come from: a checkpoint, or stacked tensors.

A `Fill` is chosen and checked before any memory is taken. It then allocates the wanted experts of
the packed layer, with room for biases if there are any, and loads several at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.experts import PackedExperts
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.load import Progress, load_layer
from hybrid_moe.loaders.packed_cache import PackedCache
from hybrid_moe.logs import warn_once
from hybrid_moe.parallel import for_each
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.packed_layers import load_packed_layer
from hybrid_moe.runtime.weights import Stacked, check_stacked, expert_of


class Receiver(Protocol):
    """Whoever takes the experts: a layer on the CPU, or both halves of one."""

    @property
    def pool(self) -> PoolConfig:
        """Its threads load."""

    def allocate(self, wanted: npt.NDArray[np.bool_], /, *, biases: bool) -> None:
        """Take memory for the experts of a bool [E]."""

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Take one expert. Thread-safe for different experts."""


Fill = Callable[[Receiver, npt.NDArray[np.bool_]], None]
"""Allocates the experts of a bool [E] in a layer that has no memory yet, and loads them."""


def from_checkpoint(
    source: ExpertSource,
    formats: LayerFormats,
    mapping: torch.Tensor,
    cache: PackedCache | None = None,
    progress: Progress | None = None,
) -> Fill:
    """Experts read from a checkpoint.

    Args:
        mapping: int64 [E], id -> the checkpoint's expert.
        cache: where packed layers are; None for nowhere. Layers with slots on a GPU do without.
        progress: see `load_layer`.
    """

    def fill(layer: Receiver, wanted: npt.NDArray[np.bool_]) -> None:
        layer.allocate(wanted, biases=source.has_bias)
        given, threads = mapping.numpy(), layer.pool.threads
        if cache is not None and isinstance(layer, PackedExperts):
            load_packed_layer(
                cache, source, formats, given, wanted, layer, threads, progress=progress
            )
            return
        if cache is not None:
            warn_once("the packed cache is for layers on the CPU: those with GPU slots do without")
        load_layer(
            source,
            given,
            wanted,
            layer.load,
            formats=formats,
            threads=threads,
            progress=progress,
        )

    return fill


def from_tensors(
    projections: dict[str, Stacked], shape: LayerShape, formats: LayerFormats, mapping: torch.Tensor
) -> Fill:
    """Experts out of stacked tensors; `mapping` is int64 [E], id -> row.

    Raises:
        TypeError, ValueError: see `check_stacked`.
    """
    check_stacked(projections, shape, formats, mapping)
    biases = any(p.bias is not None for p in projections.values())
    return from_experts(
        lambda expert: expert_of(projections, int(mapping[expert]), shape, formats), biases=biases
    )


def from_experts(read: Callable[[int], ExpertTensors], *, biases: bool) -> Fill:
    """Experts that `read` gives, called on several threads; `biases`: they may have some."""

    def fill(layer: Receiver, wanted: npt.NDArray[np.bool_]) -> None:
        layer.allocate(wanted, biases=biases)
        experts = np.flatnonzero(wanted).tolist()
        for_each(experts, lambda expert: layer.load(expert, read(expert)), layer.pool.threads)

    return fill
