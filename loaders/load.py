"""Load the experts of a layer that run on the CPU, and only those, into a packer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.safetensors import ReadBuffer, ReadBuffers
from hybrid_moe.parallel import for_each

logger = logging.getLogger(__name__)

_announced: set[tuple[str, ...]] = set()
"""What has been logged of which checkpoint: once, not once per layer."""


def check_map(mapping: Any, num_physical: int, num_logical: int) -> npt.NDArray[np.int64]:
    """Check a physical-to-logical map; several ids may stand for the same expert.

    Args:
        mapping: int64 [num_physical]: the checkpoint's expert of each id of the layer.
        num_physical: ids of the layer.
        num_logical: experts that the checkpoint has.

    Raises:
        ValueError: wrong number of axes, length or dtype, or an expert that does not exist.
    """
    array = np.asarray(mapping)
    if array.ndim != 1:
        raise ValueError(
            f"physical_to_logical_map must have one axis, this one has shape {array.shape}"
        )
    if array.dtype != np.int64:
        raise ValueError(f"physical_to_logical_map must be int64, this one is {array.dtype}")
    if len(array) != num_physical:
        raise ValueError(
            f"physical_to_logical_map has {len(array)} entries, expected {num_physical}: "
            "one per expert of the layer"
        )
    wrong = np.flatnonzero((array < 0) | (array >= num_logical))
    if wrong.size:
        raise ValueError(
            f"physical_to_logical_map[{wrong[0]}] = {array[wrong[0]]}: "
            f"the checkpoint has experts 0 to {num_logical - 1}"
        )
    return array


Progress = Callable[[int, int], None]
"""`progress(done, total)` in ids."""


class Counted:
    """Tells `progress`, if there is one, of one id after another, one call at a time."""

    def __init__(self, progress: Progress | None, ids: Mapping[int, Sequence[int]]) -> None:
        self._progress, self._lock, self._done = progress, threading.Lock(), 0
        self._total = sum(map(len, ids.values()))

    def one(self) -> None:
        """One more is loaded."""
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def wanted_ids(
    source: ExpertSource, mapping: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]
) -> dict[int, list[int]]:
    """The checkpoint's experts that are wanted, and the ids that each has.

    Raises:
        ValueError: the map or `wanted` do not fit.
    """
    wanted = np.asarray(wanted)
    if wanted.ndim != 1 or wanted.dtype != np.bool_:
        raise ValueError(
            f"wanted must be bool with one axis, this is {wanted.dtype} of shape {wanted.shape}"
        )
    mapping = check_map(mapping, len(wanted), source.num_experts)
    ids: dict[int, list[int]] = {}
    for physical in np.flatnonzero(wanted):
        ids.setdefault(int(mapping[physical]), []).append(int(physical))
    return ids


class LayerLoad:
    """What is to be read of a layer, and who takes it.

    Attributes:
        items: (the checkpoint's expert, the ids that it has) of every expert that is wanted.
    """

    def __init__(
        self,
        source: ExpertSource,
        mapping: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.bool_],
        sink: Callable[[int, ExpertTensors], None],
        *,
        formats: WeightFormat | LayerFormats,
        progress: Progress | None = None,
    ) -> None:
        """Check everything that can be checked before data is read; arguments and errors as of
        `load_layer`."""
        ids = wanted_ids(source, mapping, wanted)
        self._source, self._sink, self._formats = source, sink, layer_formats(formats)
        source.check_layout()
        _announce(source, self._formats)
        self.items = tuple(ids.items())
        self._counted = Counted(progress, ids)

    def load(self, index: int, buffer: ReadBuffer, ahead: int) -> None:
        """Read the expert of an item and hand it on, once for each of its ids. Meanwhile the kernel
        reads that of the item `ahead` items later."""
        logical, ids = self.items[index]
        if index + ahead < len(self.items):
            self._source.expect(self.items[index + ahead][0])
        tensors = self._source.expert(logical, self._formats, buffer)
        for physical in ids:
            self._sink(physical, tensors)
            self._counted.one()


def load_layers(loads: Iterable[LayerLoad], threads: int) -> None:
    """Load one layer after the other on the same threads: none waits at the end of a layer for
    those that are still at its last experts. A layer is asked for when it is its turn.

    Raises:
        ValueError, CheckpointError: see `load_layer`.
    """
    buffers = ReadBuffers()

    def load(part: tuple[LayerLoad, int]) -> None:
        layer, index = part
        layer.load(index, buffers.mine, threads)

    parts = ((layer, index) for layer in loads for index in range(len(layer.items)))
    for_each(parts, load, threads)


def load_layer(
    source: ExpertSource,
    mapping: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.bool_],
    sink: Callable[[int, ExpertTensors], None],
    *,
    formats: WeightFormat | LayerFormats,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Read the wanted experts and hand each to `sink`. Others are never read.

    Args:
        source: the layer.
        mapping: int64 [E], id -> the checkpoint's expert. An expert of several ids is read once.
        wanted: bool [E] by id, True where the expert runs on the CPU.
        sink: `sink(physical, tensors)`, called on the reading threads, at the same time for
            different experts. The arrays are reused once it has returned.
        formats: to hand the experts on in, one for all projections or two, see `held_formats`.
        threads: threads that read (and call `sink`); at least 1.
        progress: `progress(done, total)` in ids, called after each, one call at a time.

    Raises:
        ValueError: the map, `wanted` or `threads` do not fit, or the stored weights do not become
            these formats.
        CheckpointError: a shard is truncated, an expert's values are invalid, or nothing tells
            where gate and up lie.
    """
    layer = LayerLoad(source, mapping, wanted, sink, formats=formats, progress=progress)
    load_layers([layer], threads)


def _announce(source: ExpertSource, formats: LayerFormats) -> None:
    path, stored = str(source.path), source.stored_types
    if not source.is_exact(formats) and _first_time(path, stored, formats.name):
        logger.warning(
            "layer %d of %s stores its experts as %s: they are converted to %s while loading, here "
            "and in every layer like it (hybrid-moe convert does it once and for all)",
            source.layer,
            path,
            stored,
            formats.name,
        )
    if source.unused and _first_time(path, "unused"):
        logger.warning(
            "%s has tensors beside its experts that are not used, such as %s: activations are "
            "not quantized as the checkpoint says",
            path,
            source.unused[0],
        )


def _first_time(*what: str) -> bool:
    if what in _announced:
        return False
    _announced.add(what)
    return True
