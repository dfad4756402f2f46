"""Filling the empty experts modules of a model from its checkpoint, or from the packed cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.integrations.transformers.hybrid_experts import HybridExperts
from hybrid_moe.integrations.transformers.options import ExpertsOptions
from hybrid_moe.integrations.transformers.split_experts import SplitSpec
from hybrid_moe.loaders import ExpertSource
from hybrid_moe.loaders.load import LayerLoad, Progress, load_layers
from hybrid_moe.loaders.packed_cache import PackedCache
from hybrid_moe.runtime import filling
from hybrid_moe.runtime.packed_layers import load_packed_layer


@dataclass(frozen=True)
class ExpertsPart:
    """One experts module, still empty, and what it gets.

    Attributes:
        source: its experts in the checkpoint.
        module: the module.
        formats: in which they are held.
        split: which of them go to a GPU's slots; None for none.
        progress: see `load_layer`.
    """

    source: ExpertSource
    module: HybridExperts
    formats: LayerFormats
    split: SplitSpec | None = None
    progress: Progress | None = None

    @property
    def wanted(self) -> npt.NDArray[np.bool_]:
        """bool [E], all of them."""
        return np.ones(self.module.spec.num_experts, np.bool_)

    @property
    def mapping(self) -> npt.NDArray[np.int64]:
        """int64 [E], the identity."""
        return np.arange(self.module.spec.num_experts, dtype=np.int64)


def load_experts(
    parts: Sequence[ExpertsPart], options: ExpertsOptions, cache: PackedCache | None = None
) -> None:
    """Fill the empty experts modules of a model from its checkpoint.

    Args:
        cache: where packed layers are; None for nowhere.

    Raises:
        CheckpointError: an expert is damaged.
        ValueError: the stored weights do not become a layer's formats; see `SplitExperts`.
    """
    threads = options.pool_config().threads
    for part in parts:
        if part.split is not None:
            mapping = torch.from_numpy(part.mapping)
            fill = filling.from_checkpoint(part.source, part.formats, mapping, cache, part.progress)
            part.module.allocate_split(options, part.formats, part.split).load(fill)
        elif cache is not None:
            load_packed_layer(
                cache,
                part.source,
                part.formats,
                part.mapping,
                part.wanted,
                part.module.allocate(options, part.formats),
                threads,
                part.progress,
            )
    if cache is None:
        load_layers(
            (
                LayerLoad(
                    part.source,
                    part.mapping,
                    part.wanted,
                    part.module.allocate(options, part.formats).load,
                    formats=part.formats,
                    progress=part.progress,
                )
                for part in parts
                if part.split is None
            ),
            threads,
        )
