"""Write a sharded safetensors checkpoint whose sizes are known before its values.

Headers are written first and every tensor has its place, so that tensors may arrive in any order,
in pieces and from several threads, and none has to be kept. All files carry temporary names until
the last byte is written: what lies under a final name is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.loaders.files import INDEX_NAME
from hybrid_moe.loaders.header import STORAGE_TYPES
from hybrid_moe.loaders.regular import open_regular

PARTIAL = ".partial"
"""Ending of a file that is being written."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the checkpoint to be written; dtype as safetensors names it."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * STORAGE_TYPES[self.dtype].bits // 8


class ShardedWriter:
    """Files of one checkpoint under temporary names. Writing is thread-safe.

    Args:
        directory: an existing directory.
        tensors: everything that will be written; order is kept but for alignment.
        shard_bytes: largest size of a shard's data; a larger tensor gets a shard of its own.

    Attributes:
        shards: final names of the files of tensors.
    """

    def __init__(self, directory: Path, tensors: Sequence[PlannedTensor], shard_bytes: int) -> None:
        self._directory = directory
        self.shards: list[str] = []
        self._places: dict[str, tuple[int, int, int]] = {}  # key -> descriptor, offset, bytes
        self._descriptors: list[int] = []
        self._names: list[str] = []
        shards = _fill_shards(tensors, shard_bytes)
        weight_map: dict[str, str] = {}
        try:
            for number, shard in enumerate(shards, 1):
                name = "model.safetensors"
                if len(shards) > 1:
                    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._start_shard(name, shard)
                weight_map.update((tensor.key, name) for tensor in shard)
            if len(shards) > 1:
                total = sum(tensor.nbytes for tensor in tensors)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                self.add_file(INDEX_NAME, json.dumps(index, indent=2, sort_keys=True).encode())
        except BaseException:
            self.abort()
            raise

    def write(self, key: str, data: Array, at: int = 0) -> None:
        """Write `data` `at` bytes after the start of tensor `key`."""
        descriptor, offset, nbytes = self._places[key]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if at < 0 or at + len(view) > nbytes:
            raise ValueError(f"{key}: bytes {at} to {at + len(view)} of a tensor of {nbytes}")
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + at + done)

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write a whole file beside the shards, or copy it from a path. `name` may hold "/"."""
        self._names.append(name)
        file = self._directory / (name + PARTIAL)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with os.fdopen(open_regular(content)[0], "rb") as source:
                    shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())

    def finish(self) -> None:
        """Make everything durable and give every file its name, in the order of their writing."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._close()
        for name in self._names:
            (self._directory / (name + PARTIAL)).replace(self._directory / name)
        # a name is an entry of its folder, and so is a folder's
        folders = {parent for name in self._names for parent in Path(name).parents}
        for folder in (*(self._directory / f for f in folders), self._directory.absolute().parent):
            _sync_folder(folder)

    def abort(self) -> None:
        """Remove what has been written."""
        self._close()
        for name in self._names:
            file = self._directory / (name + PARTIAL)
            file.unlink(missing_ok=True)
            while file.parent != self._directory and not any(file.parent.iterdir()):
                file = file.parent
                file.rmdir()

    def _start_shard(self, name: str, tensors: Sequence[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.nbytes
            header[tensor.key] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self._names.append(name)
        self.shards.append(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self._directory / (name + PARTIAL), flags, 0o644)
        self._descriptors.append(descriptor)
        start = 8 + len(text)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(descriptor, start + end)
        for tensor in tensors:
            self._places[tensor.key] = (descriptor, start, tensor.nbytes)
            start += tensor.nbytes

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill_shards(tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    for shard in shards:  # wide elements first, so that each tensor's data is aligned to its dtype
        shard.sort(key=lambda tensor: -STORAGE_TYPES[tensor.dtype].bits)
    return shards
