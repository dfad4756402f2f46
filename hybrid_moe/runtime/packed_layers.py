"""Loading a layer by way of the packed cache: out of it, or from the checkpoint and into it."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.experts import BIASED, PackedExperts
from hybrid_moe.cpu_kernels.fingerprint import fingerprint
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.load import Counted, Progress, load_layer, wanted_ids
from hybrid_moe.loaders.packed_cache import (
    DamagedCacheError,
    PackedCache,
    PackedKey,
    PackedLayer,
    PackedWriter,
)
from hybrid_moe.parallel import for_each


def cache_at(directory: str | os.PathLike[str] | None) -> PackedCache | None:
    """The packed cache in a directory; None for none.

    Raises:
        ValueError: it cannot be used.
    """
    return None if directory is None else PackedCache(directory, fingerprint)


def load_packed_layer(
    cache: PackedCache,
    source: ExpertSource,
    formats: LayerFormats,
    mapping: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.bool_],
    layer: PackedExperts,
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Load the wanted experts into a layer that has memory for them, with the bits that
    `load_layer` would give it. What is not in the cache is there afterwards.

    Args:
        mapping, wanted, threads, progress: see `load_layer`.

    Raises:
        ValueError, CheckpointError: see `load_layer`.
    """
    ids = wanted_ids(source, mapping, wanted)
    shares = layer.shares(biases=source.has_bias)
    pools = [share.nbytes for share in shares]
    key = PackedKey.of(source, formats, shares)
    if not ids:
        return
    packed = cache.open(key, set(ids), pools)
    if packed is not None:
        try:
            _read(packed, ids, layer, threads, progress)
            return
        except DamagedCacheError as error:
            cache.refuse(key, error)
        finally:
            packed.close()
    build = _Build(cache, cache.create(key, sorted(ids), pools), layer, ids)
    try:
        load_layer(
            source, mapping, wanted, build.load, formats=formats, threads=threads, progress=progress
        )
        build.finish()
    finally:
        build.drop()


def _read(
    packed: PackedLayer,
    ids: dict[int, list[int]],
    layer: PackedExperts,
    threads: int,
    progress: Progress | None,
) -> None:
    counted = Counted(progress, ids)

    def load(item: tuple[int, list[int]]) -> None:
        logical, physical = item
        biased = packed.biased(logical)
        for slot in physical:
            layer.load_packed(slot, lambda pool, to: packed.read(logical, pool, to), biased)
            counted.one()

    for_each(ids.items(), load, threads)


class _Build:
    """Loads experts into a layer, and writes each one that comes first of its kind."""

    def __init__(
        self,
        cache: PackedCache,
        writer: PackedWriter | None,
        layer: PackedExperts,
        ids: dict[int, list[int]],
    ) -> None:
        self._cache, self._writer, self._layer = cache, writer, layer
        self._failed: PackedWriter | None = None
        self._first = {physical[0]: logical for logical, physical in ids.items()}

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Take one expert. Thread-safe for different experts."""
        self._layer.load(expert, tensors)
        writer, logical = self._writer, self._first.get(expert)
        if writer is None or logical is None:
            return
        biased = [getattr(tensors, name).bias is not None for name in BIASED]
        try:
            writer.put(logical, self._layer.ranges_of(expert), biased)
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """All experts are loaded."""
        if self._writer is not None:
            try:
                self._writer.finish()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The weights are in memory all the same; other threads may still write what goes."""
        self._failed, self._writer = self._writer, None
        self._cache.give_up(error)

    def drop(self) -> None:
        """Leave nothing behind that is not whole."""
        for writer in (self._writer, self._failed):
            if writer is not None:
                writer.drop()
