"""All tensors of a checkpoint by key, read with `preadv` into memory that the caller may reuse.

The headers of all shards are scanned once, in parallel. Data is read, not mapped: a file that
shrinks under a mapping ends the process with SIGBUS, whereas a short read is an exception.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats import Array
from hybrid_moe.loaders.header import TensorInfo, read_header
from hybrid_moe.locks import ProcessLock
from hybrid_moe.tensors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
_SCAN_THREADS = 8  # headers are small: this hides the latency of a cold or remote disk


class ReadBuffer:
    """Memory that one thread reuses for one expert after another.

    Arrays that `take` returned are overwritten after the next `reset`.
    """

    def __init__(self) -> None:
        self._memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def reset(self, nbytes: int) -> None:
        """Make room for arrays of `nbytes` bytes in all, and forget those taken before."""
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next `nbytes` bytes. The start is aligned for any dtype."""
        start = self._used
        if start + nbytes > self._memory.size:  # not reserved: fresh memory, still correct
            return np.empty(nbytes, np.uint8)
        self._used = start + aligned(nbytes)
        return self._memory[start : start + nbytes]


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to what `ReadBuffer.take` advances by."""
    return -(-nbytes // 64) * 64


class SafetensorsIndex:
    """The tensors of one checkpoint. Reading is thread-safe.

    Attributes:
        path: the directory or file that was opened.
        tensors: every tensor's place by its key, read-only.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self._descriptors: dict[Path, int] = {}
        self._lock = ProcessLock()
        self._closer = weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsIndex:
        """Scan a checkpoint's headers.

        Args:
            path: a safetensors file, or a directory. In a directory, the shards that
                `model.safetensors.index.json` names; without that file, every `*.safetensors`.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            CheckpointError: no shards, a shard is missing, truncated or has a damaged header, a
                key of the index is in no shard, or a key is in two shards.
        """
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"no checkpoint at {root}: the path does not exist")
        weight_map: Mapping[str, str] = {}
        if root.is_dir():
            index_file = root / INDEX_NAME
            if index_file.exists():
                weight_map = _read_weight_map(index_file)
                files = [root / name for name in sorted(set(weight_map.values()))]
                _check_shards_exist(files, weight_map, index_file)
            else:
                files = sorted(root.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{root}: no *.safetensors file in this directory")
        else:
            files = [root]
        tensors = _scan(files)
        for key, name in weight_map.items():
            if key not in tensors or tensors[key].file.name != name:
                raise CheckpointError(
                    f"{key}: {INDEX_NAME} says that it is in {root / name}, but it is not"
                )
        return cls(root, tensors)

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
        offset, nbytes, shape = tensor.offset, tensor.nbytes, tensor.raw_shape
        if rows is not None:
            if not shape:
                raise ValueError(f"{tensor.where}: rows of a scalar")
            first, last, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"{tensor.where}: rows must have step 1, not {step}")
            count = max(0, last - first)
            row_bytes = nbytes // shape[0] if shape[0] else 0
            offset, nbytes, shape = (
                offset + first * row_bytes,
                count * row_bytes,
                (count, *shape[1:]),
            )
        if out is None:
            out = np.empty(nbytes, np.uint8)
        elif out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes < nbytes:
            raise ValueError(f"{tensor.where}: out must be contiguous uint8 of {nbytes} bytes")
        target = out.reshape(-1)[:nbytes]
        self._read_into(tensor, offset, target)
        return target.view(tensor.raw_dtype).reshape(shape)

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

    def _descriptor(self, file: Path) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is not None:
            return descriptor
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _read_weight_map(index_file: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index_file.read_text("utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index_file}: no valid index with a weight_map") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: weight_map is no table of tensors and files")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{index_file}: {key} is in {name!r}, which is no file name")
    return weight_map


def _check_shards_exist(
    files: Iterable[Path], weight_map: Mapping[str, str], index_file: Path
) -> None:
    for file in files:
        if not file.is_file():
            keys = [key for key, name in weight_map.items() if name == file.name]
            raise CheckpointError(
                f"{file}: this shard is missing; {index_file.name} says that it holds "
                f"{len(keys)} tensors, among them {keys[0]}"
            )


def _scan(files: list[Path]) -> dict[str, TensorInfo]:
    with ThreadPoolExecutor(min(_SCAN_THREADS, len(files))) as pool:
        headers = list(pool.map(read_header, files))
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
