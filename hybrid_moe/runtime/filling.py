"""Where a layer's weights come from: a checkpoint, or stacked tensors.

A `Fill` is chosen and checked before any memory is taken, and then puts the wanted experts into the
packed layer, several at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.formats.table import WeightFormat
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.load import load_layer
from hybrid_moe.parallel import for_each
from hybrid_moe.runtime.arguments import LayerShape
from hybrid_moe.runtime.weights import Stacked, check_stacked, expert_of

Fill = Callable[[ExpertLayer, npt.NDArray[np.bool_]], None]
"""Loads the experts of a bool [E], for which the layer has memory, into it."""


def from_checkpoint(source: LayerSource, fmt: WeightFormat, mapping: torch.Tensor) -> Fill:
    """Experts read from a checkpoint; `mapping` is int64 [E], id -> the checkpoint's expert."""

    def fill(layer: ExpertLayer, wanted: npt.NDArray[np.bool_]) -> None:
        threads = layer.pool.threads
        load_layer(source, mapping.numpy(), wanted, layer.load, fmt=fmt, threads=threads)

    return fill


def from_tensors(
    projections: dict[str, Stacked], shape: LayerShape, fmt: WeightFormat, mapping: torch.Tensor
) -> Fill:
    """Experts out of stacked tensors; `mapping` is int64 [E], id -> row.

    Raises:
        TypeError, ValueError: see `check_stacked`.
    """
    check_stacked(projections, shape, fmt, mapping)

    def fill(layer: ExpertLayer, wanted: npt.NDArray[np.bool_]) -> None:
        def load(expert: int) -> None:
            layer.load(expert, expert_of(projections, int(mapping[expert]), shape, fmt))

        for_each(np.flatnonzero(wanted).tolist(), load, layer.pool.threads)

    return fill
