"""Load the experts of a layer that run on the CPU, and only those, into a packer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.loaders.expert_source import ExpertSource
from hybrid_moe.loaders.safetensors import ReadBuffers
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
    ids = wanted_ids(source, mapping, wanted)
    held = layer_formats(formats)
    source.check_layout()
    _announce(source, held)
    counted, buffers = Counted(progress, ids), ReadBuffers()

    def load(item: tuple[int, list[int]]) -> None:
        logical, physical_slots = item
        tensors = source.expert(logical, held, buffers.mine)
        for physical in physical_slots:
            sink(physical, tensors)
            counted.one()

    for_each(ids.items(), load, threads)


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
