"""All tensors of a checkpoint by key, read with `preadv` into memory that the caller may reuse.

The headers of all shards are scanned once, in parallel. Data is read, not mapped: a file that
shrinks under a mapping ends the process with SIGBUS, whereas a short read is an exception.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import round_up
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.files import CheckpointFiles, choose_files
from hybrid_moe.loaders.header import TensorInfo, read_header
from hybrid_moe.loaders.page_cache import expect_pages, release_pages, releases_pages
from hybrid_moe.loaders.regular import Stamp, open_regular, stamp
from hybrid_moe.locks import ProcessLock
from hybrid_moe.logs import warn_once
from hybrid_moe.parallel import map_all

_ALIGNMENT = 64
"""Bytes: of arrays in a `ReadBuffer`."""

_SCAN_THREADS = 8  # headers are small: this hides the latency of a cold or remote disk


class ReadBuffer:
    """Memory that one thread reuses for one expert after another.

    Arrays that `take` returned are overwritten after the next `reset`.
    """

    def __init__(self) -> None:
        self._memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def reset(self, sizes: Iterable[int]) -> None:
        """Make room for arrays of so many bytes each, and forget those taken before."""
        nbytes = sum(round_up(size, _ALIGNMENT) for size in sizes)
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next `nbytes` bytes. The start is aligned for any dtype."""
        start = self._used
        if start + nbytes > self._memory.size:  # not reserved: fresh memory, still correct
            return np.empty(nbytes, np.uint8)
        self._used = start + round_up(nbytes, _ALIGNMENT)
        return self._memory[start : start + nbytes]


class ReadBuffers(threading.local):
    """`ReadBuffers().mine` is the calling thread's own buffer."""

    def __init__(self) -> None:
        self.mine = ReadBuffer()


class SafetensorsIndex:
    """The tensors of one checkpoint. Reading is thread-safe.

    Attributes:
        path: the directory or file that was opened.
        tensors: every tensor's place by its key, read-only.
        rival: a file of another checkpoint in the same directory, which was passed over.
        stale: of tensors that lie in several shards of an index, the last of the files (in the
            order of their names) from which they are not read.
        stamps: the files that it was read from, as they were then; None for one that was absent.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        files: CheckpointFiles | None = None,
        stamps: Mapping[Path, Stamp] | None = None,
        stale: Mapping[str, Path] | None = None,
    ) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.rival = None if files is None else files.rival
        self.stale: Mapping[str, Path] = MappingProxyType(dict(stale or {}))
        self.stamps: Mapping[Path, Stamp | None] = MappingProxyType(
            {**({} if files is None else files.stamps), **(stamps or {})}
        )
        self._descriptors: dict[Path, int] = {}
        self._lock = ProcessLock()
        self._closer = weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        named: object | None = None,
    ) -> SafetensorsIndex:
        """Scan a checkpoint's headers. The arguments choose its files, see `choose_files`.

        With an index, a tensor is read from the file that the index says; copies of it in other
        shards and tensors that it does not list are ignored.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            CheckpointError: no shards, a shard is missing, truncated or has a damaged header, a
                key of the index is not where it says, or a key is in two shards without an index.
        """
        files = choose_files(Path(path), variant, named)
        if files.rival is not None:
            single, rival = files.shards[0].name, files.rival.name
            warn_once(
                f"{files.path} holds two checkpoints, {single} and {rival} with its neighbours: "
                f"{single} is read, as by Transformers"
            )
        scanned = map_all(read_header, files.shards, min(_SCAN_THREADS, len(files.shards)))
        headers = [tensors for tensors, _ in scanned]
        stamps = dict(zip(files.shards, (stamp for _, stamp in scanned), strict=True))
        if files.index is None:
            return cls(files.path, _all_tensors(headers), files, stamps)
        tensors, stale = _indexed_tensors(headers, files.weight_map, files.index)
        return cls(files.path, tensors, files, stamps, stale)

    @property
    def state(self) -> str:
        """A text that another state of the files does not have. The folder's own stamp is left out:
        it tells of files beside them too."""
        files = sorted(self.stamps.items())
        return "; ".join(f"{file}: {found}" for file, found in files if not file.is_dir())

    def info(self, key: str) -> TensorInfo:
        """Where `key` lies. Raises `CheckpointError` where there is no such tensor."""
        tensor = self.tensors.get(key)
        if tensor is None:
            raise CheckpointError(f"{key}: no such tensor in {self.path}")
        return tensor

    def read(
        self, key: str, rows: slice | None = None, out: npt.NDArray[np.uint8] | None = None
    ) -> Array:
        """Read a tensor, or a range of its first axis, as a raw NumPy array.

        Args:
            key: the tensor's name.
            rows: range of the first axis, step 1; None reads all of it.
            out: uint8 [>= bytes to read], C-contiguous: receives the bytes; None allocates.

        Returns:
            Array of `TensorInfo.raw_dtype` (BF16 as uint16, 8-bit floats and F4 as uint8) and
            `TensorInfo.raw_shape`; a view of `out` where that is given.

        Raises:
            CheckpointError: no such tensor, or its file has become shorter.
            ValueError: `rows` or `out` do not fit.
        """
        tensor = self.info(key)
        offset, nbytes, shape = _range_of(tensor, rows)
        if out is None:
            out = np.empty(nbytes, np.uint8)
        elif out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes < nbytes:
            raise ValueError(f"{tensor.where}: out must be contiguous uint8 of {nbytes} bytes")
        target = out.reshape(-1)[:nbytes]
        self._read_into(tensor, offset, target)
        return target.view(tensor.raw_dtype).reshape(shape)

    def expect(self, key: str, rows: slice | None = None) -> None:
        """Let the kernel read ahead what `read` will soon be asked for; errors as there."""
        tensor = self.info(key)
        offset, nbytes, _ = _range_of(tensor, rows)
        expect_pages(self._descriptor(tensor.file), offset, nbytes)

    def close(self) -> None:
        """Close the shards. A later `read` opens them again."""
        with self._lock:
            _close_all(self._descriptors)

    def _read_into(self, tensor: TensorInfo, offset: int, target: npt.NDArray[np.uint8]) -> None:
        descriptor = self._descriptor(tensor.file)
        view = target.data
        done = 0
        while done < len(view):  # one call returns 2 GiB at most
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.where}: truncated: the file ends at byte {offset + done}, "
                    f"{len(view) - done} bytes early"
                )
            done += count
        self._check_unchanged(tensor.file, stamp(os.fstat(descriptor)))
        if self._releases:
            release_pages(descriptor, offset, done)

    @cached_property
    def _releases(self) -> bool:
        return releases_pages(sum(s.nbytes for s in self.stamps.values() if s is not None))

    def _descriptor(self, file: Path) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is not None:
            return descriptor
        with self._lock:
            if file not in self._descriptors:
                descriptor, found = open_regular(file)
                try:
                    self._check_unchanged(file, found)
                except CheckpointError:
                    os.close(descriptor)
                    raise
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _check_unchanged(self, file: Path, found: Stamp) -> None:
        """What was scanned must be what is read: the offsets are those of that file."""
        if found != self.stamps.get(file, found):
            raise CheckpointError(
                f"{file}: changed since its header was read; open the checkpoint again when it is "
                "complete"
            )


def _range_of(tensor: TensorInfo, rows: slice | None) -> tuple[int, int, tuple[int, ...]]:
    """Offset, bytes and raw shape of rows of a tensor's first axis; None for all of it.

    Raises:
        ValueError: `rows` do not fit.
    """
    offset, nbytes, shape = tensor.offset, tensor.nbytes, tensor.raw_shape
    if rows is None:
        return offset, nbytes, shape
    if not shape:
        raise ValueError(f"{tensor.where}: rows of a scalar")
    first, last, step = rows.indices(shape[0])
    if step != 1:
        raise ValueError(f"{tensor.where}: rows must have step 1, not {step}")
    count = max(0, last - first)
    row_bytes = nbytes // shape[0] if shape[0] else 0
    return offset + first * row_bytes, count * row_bytes, (count, *shape[1:])


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _all_tensors(headers: Iterable[Iterable[TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of shards without an index."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header:
            other = tensors.setdefault(tensor.key, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{tensor.key}: in {other.file} and again in {tensor.file}; "
                    "a tensor must be in one shard"
                )
    return tensors


def _indexed_tensors(
    headers: Iterable[Iterable[TensorInfo]], weight_map: Mapping[str, str], index: Path
) -> tuple[dict[str, TensorInfo], dict[str, Path]]:
    """The tensors that an index assigns, and the last files with other copies of them."""
    tensors: dict[str, TensorInfo] = {}
    stale: dict[str, Path] = {}
    unlisted: list[str] = []
    for header in headers:
        for tensor in header:
            name = weight_map.get(tensor.key)
            if name is None:
                unlisted.append(tensor.key)
            elif name == tensor.file.name:
                tensors[tensor.key] = tensor
            else:
                stale[tensor.key] = tensor.file
    for key, name in weight_map.items():
        if key not in tensors:
            raise CheckpointError(
                f"{key}: {index.name} says that it is in {index.parent / name}, but it is not"
            )
    for keys, what in (
        (list(stale), "which it assigns to other files, are ignored there"),
        (unlisted, "which it does not list, are ignored"),
    ):
        if keys:
            warn_once(f"{index}: {len(keys)} tensors in its shards, {what}, such as {keys[0]}")
    return tensors, stale
