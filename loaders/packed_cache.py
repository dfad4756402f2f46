"""Packed experts on disk: a layer as its packer left it, to be read back as it is.

A file holds one layer. Experts lie one behind the other, each as the ranges that pools hold of it:

    header, whole pages | expert: [range of pool 0 | zeros to a page] [range of pool 1 | ...] | ...

Everything begins at a multiple of 4096 bytes, so that one direct read brings an expert, or a pool's
range of it. A range has a checksum, the header has a digest of its own.

The name is the hash of all that the bytes derive from (`PackedKey`): files in another state,
another format, layout or number of pools are another name. A file is written under a temporary name
and renamed when it is whole. The rules of `binary_cache` hold: the directory and the files are this
user's or root's, nobody else may write to them, and links are not followed.

Ranges are read, not mapped. A pass over pages of a file reaches 0.7 to 0.9 of the bandwidth that it
has on an arena's huge pages (Zen 4, 2 threads), a mapping of a file that is cut short ends the
process, and reading takes no longer than the disk does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybrid_moe.binary_cache import (
    CREATE_FILE,
    OPEN_DIRECTORY,
    OPEN_FILE,
    TEMPORARY_S,
    check_private,
)
from hybrid_moe.formats.shares import ShareLayout
from hybrid_moe.formats.strips import round_up
from hybrid_moe.formats.weight_format import LayerFormats
from hybrid_moe.loaders.expert_source import ExpertSource

logger = logging.getLogger(__name__)

VERSION = 1
"""Of these files. Raise it too when a loader, a quantizer or a packer makes other bytes than before
of the same checkpoint."""

PAGE = 4096
_MAGIC = b"hybrdmoe"
_FIXED = struct.Struct("<8sIIIIQQ32s32s")
"""magic, version, pools, experts, 0, bytes of the header, of the file, key, digest."""
_TEMPORARY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.packed\.[0-9a-f]{16}\.tmp")
_DIGEST_AT = _FIXED.size - 32
_MOST_EXPERTS, _MOST_POOLS = 1 << 16, 1 << 10

Bytes = npt.NDArray[np.uint8]
Checksum = Callable[[Bytes], int]
"""uint8 [a multiple of 8] -> 64 bits, signed."""


class DamagedCacheError(Exception):
    """A file of the cache is not what it says; the message says how."""


@dataclass(frozen=True)
class PackedKey:
    """What a file's bytes derive from.

    Attributes:
        place: hash of what stays when the checkpoint changes: where it is, layer, formats, pools.
        content: hash of everything.
    """

    place: str
    content: str

    @classmethod
    def of(
        cls, source: ExpertSource, formats: LayerFormats, shares: Sequence[ShareLayout]
    ) -> PackedKey:
        """The key of a layer's experts in these formats, cut over pools so."""
        place = [
            str(source.path.resolve()),
            source.layer,
            [fmt.name for fmt in formats],
            [[str(share.blocks), str(share.strips), share.nbytes] for share in shares],
        ]
        layouts = [[repr(share.gate_up), repr(share.down)] for share in shares[:1]]
        content = [VERSION, source.state, layouts, place]
        return cls(_hash(place)[:16], _hash(content))

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.place}-{self.content}.packed"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _record_dtype(pools: int) -> np.dtype[np.void]:
    """What the header says of an expert: its number, a bit for each of gate, up and down that has a
    bias, and the checksum of each pool's range."""
    return np.dtype([("expert", "<u4"), ("biased", "<u4"), ("sums", "<i8", (pools,))])


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a file lie, for so many experts and ranges of so many bytes."""

    experts: int
    pools: tuple[int, ...]

    @property
    def header_bytes(self) -> int:
        table = self.experts * _record_dtype(len(self.pools)).itemsize
        return round_up(_FIXED.size + 8 * len(self.pools) + table, PAGE)

    @property
    def record_bytes(self) -> int:
        """Of an expert."""
        return sum(round_up(nbytes, PAGE) for nbytes in self.pools)

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.experts * self.record_bytes

    def at(self, index: int, pool: int) -> int:
        """Where the range of an expert begins, the index-th one of the file."""
        before = sum(round_up(nbytes, PAGE) for nbytes in self.pools[:pool])
        return self.header_bytes + index * self.record_bytes + before

    def header(self, key: PackedKey, table: npt.NDArray[np.void]) -> bytes:
        key_bytes = bytes.fromhex(key.content)
        numbers = (VERSION, len(self.pools), self.experts, 0, self.header_bytes, self.file_bytes)
        fixed = _FIXED.pack(_MAGIC, *numbers, key_bytes, bytes(32))
        rest = np.array(self.pools, "<i8").tobytes() + table.tobytes()
        text = (fixed + rest).ljust(self.header_bytes, b"\0")
        digest = hashlib.sha256(text).digest()
        return text[:_DIGEST_AT] + digest + text[_FIXED.size :]


class PackedLayer:
    """A file that has been opened and whose header is right. Reading is thread-safe."""

    def __init__(
        self, descriptor: int, layout: _Layout, table: npt.NDArray[np.void], checksum: Checksum
    ) -> None:
        self._descriptor, self._layout, self._checksum = descriptor, layout, checksum
        self._index = {int(row["expert"]): i for i, row in enumerate(table)}
        self._table = table

    @property
    def experts(self) -> frozenset[int]:
        """Those that it holds."""
        return frozenset(self._index)

    def biased(self, expert: int) -> list[bool]:
        """Whether an expert's gate, up and down have biases."""
        bits = int(self._table["biased"][self._index[expert]])
        return [bool(bits >> i & 1) for i in range(3)]

    def read(self, expert: int, pool: int, memory: Bytes) -> None:
        """Fill uint8 [nbytes] with a pool's range of an expert.

        Raises:
            DamagedCacheError: the file is too short, cannot be read, or holds other bytes.
        """
        index = self._index[expert]
        at, view = self._layout.at(index, pool), memory.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], at + done)
            except OSError as error:
                raise DamagedCacheError(f"it cannot be read: {error}") from error
            if count == 0:
                raise DamagedCacheError(f"it ends within expert {expert}")
            done += count
        if self._checksum(memory) != self._table["sums"][index, pool]:
            raise DamagedCacheError(f"expert {expert} has other bytes than were written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class PackedWriter:
    """Writes a layer's file. `put` is thread-safe for different experts; `finish` or `drop` ends
    it."""

    def __init__(
        self,
        directory: int,
        key: PackedKey,
        experts: Sequence[int],
        pools: Sequence[int],
        checksum: Checksum,
    ) -> None:
        """Take the room on disk.

        Args:
            directory: a descriptor, which stays the caller's.

        Raises:
            OSError: there is not so much room, or none may be taken.
        """
        self._key, self._checksum = key, checksum
        self._layout = _Layout(len(experts), tuple(pools))
        self._table = np.zeros(len(experts), _record_dtype(len(pools)))
        self._table["expert"] = experts
        self._index = {expert: i for i, expert in enumerate(experts)}
        self._temporary = f"{key.name}.{secrets.token_hex(8)}.tmp"
        self._directory = os.dup(directory)
        self._file = -1
        try:
            self._file = os.open(self._temporary, CREATE_FILE, 0o600, dir_fd=directory)
            os.posix_fallocate(self._file, 0, self._layout.file_bytes)
        except BaseException:
            self.drop()
            raise

    def put(self, expert: int, ranges: Sequence[Bytes], biased: Sequence[bool]) -> None:
        """Write the pools' ranges of an expert. Raises `OSError`."""
        index = self._index[expert]
        for pool, memory in enumerate(ranges):
            at, view, done = self._layout.at(index, pool), memory.data, 0
            while done < len(view):
                done += os.pwritev(self._file, [view[done:]], at + done)
            self._table["sums"][index, pool] = self._checksum(memory)
        self._table["biased"][index] = sum(bool(has) << i for i, has in enumerate(biased))

    def finish(self) -> None:
        """Give the file its name; files of other states of the checkpoint go. Raises `OSError`.

        Nothing waits for the disk: what a crash leaves unwritten does not pass its checksums.
        """
        try:
            header = self._layout.header(self._key, self._table)
            if os.pwrite(self._file, header, 0) != len(header):
                raise OSError("the header was not written whole")
            here = self._directory
            os.replace(self._temporary, self._key.name, src_dir_fd=here, dst_dir_fd=here)
            for name in _of_place(self._directory, self._key.place):
                if name != self._key.name:
                    _unlink(name, self._directory)
        finally:
            self.drop()

    def drop(self) -> None:
        """Close it, and remove what has no name yet."""
        if self._directory < 0:
            return
        _unlink(self._temporary, self._directory)
        if self._file >= 0:
            os.close(self._file)
        os.close(self._directory)
        self._directory = self._file = -1


class PackedCache:
    """A directory of packed layers."""

    def __init__(self, directory: str | os.PathLike[str], checksum: Checksum) -> None:
        """Make it if it is not there.

        Raises:
            ValueError: it cannot be made or opened, or somebody else could write to it.
        """
        self.path = Path(directory).expanduser().absolute()
        self._checksum = checksum
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened():
                pass
        except OSError as error:
            why = "it is a link: name the folder itself" if self.path.is_symlink() else error
            raise ValueError(f"cache {self.path} cannot be used: {why}") from error

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the directory, as it is now."""
        descriptor = os.open(self.path, OPEN_DIRECTORY)
        try:
            check_private(os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def open(self, key: PackedKey, experts: set[int], pools: Sequence[int]) -> PackedLayer | None:
        """The layer's file, if there is one that holds these experts; says why one is refused.

        Args:
            pools: bytes of each pool's range of an expert.
        """
        try:
            with self._opened() as directory:
                try:
                    return self._open(key, experts, pools, directory)
                except FileNotFoundError:
                    if any(_of_place(directory, key.place)):
                        self.refuse(key, "what is there is of another state of the checkpoint")
        except (OSError, DamagedCacheError) as error:
            self.refuse(key, error)
        return None

    def refuse(self, key: PackedKey, why: object) -> None:
        """Say that the file of a layer is not used."""
        logger.warning("packed cache %s: %s; it is built again", self.path / key.name, why)

    def _open(
        self, key: PackedKey, experts: set[int], pools: Sequence[int], directory: int
    ) -> PackedLayer:
        descriptor = os.open(key.name, OPEN_FILE, dir_fd=directory)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedCacheError("it is not a regular file")
            check_private(status)
            layout, table = _read_header(descriptor, status.st_size, key, tuple(pools))
            layer = PackedLayer(descriptor, layout, table, self._checksum)
            if missing := experts - layer.experts:
                raise DamagedCacheError(f"it lacks {len(missing)} experts, such as {min(missing)}")
        except BaseException:
            os.close(descriptor)
            raise
        return layer

    def create(
        self, key: PackedKey, experts: Sequence[int], pools: Sequence[int]
    ) -> PackedWriter | None:
        """A writer for the layer; None, which is logged, where it cannot be stored."""
        try:
            with self._opened() as directory:
                _remove_abandoned(directory)
                return PackedWriter(directory, key, experts, pools, self._checksum)
        except OSError as error:
            self.give_up(error)
        return None

    def give_up(self, error: object) -> None:
        """Say that a layer is not stored."""
        logger.warning("packed cache %s: a layer cannot be stored: %s", self.path, error)


def _read_header(
    descriptor: int, size: int, key: PackedKey, pools: tuple[int, ...]
) -> tuple[_Layout, npt.NDArray[np.void]]:
    """The header, checked before its sizes are believed.

    Raises:
        DamagedCacheError: see `PackedCache.open`.
    """
    start = os.pread(descriptor, _FIXED.size, 0)
    if len(start) < _FIXED.size:
        raise DamagedCacheError("it is too short for a header")
    magic, version, count, experts, _, header_bytes, file_bytes, content, digest = _FIXED.unpack(
        start
    )
    if magic != _MAGIC:
        raise DamagedCacheError("it is no packed layer")
    if version != VERSION:
        raise DamagedCacheError(f"it is of version {version}, not {VERSION}")
    if not (count == len(pools) <= _MOST_POOLS and 0 < experts <= _MOST_EXPERTS):
        raise DamagedCacheError(f"it has {experts} experts in {count} pools")
    layout = _Layout(experts, pools)
    if (header_bytes, file_bytes, size) != (layout.header_bytes, *[layout.file_bytes] * 2):
        raise DamagedCacheError(f"it has {size} bytes, expected {layout.file_bytes}")
    text = os.pread(descriptor, header_bytes, 0)
    blank = text[:_DIGEST_AT] + bytes(32) + text[_FIXED.size :]
    if hashlib.sha256(blank).digest() != digest or content.hex() != key.content:
        raise DamagedCacheError("its header is damaged")
    begin = _FIXED.size + 8 * count
    if tuple(np.frombuffer(text[_FIXED.size : begin], "<i8").tolist()) != pools:
        raise DamagedCacheError("its ranges have other sizes")
    table = np.frombuffer(text, _record_dtype(count), experts, begin)
    if len(np.unique(table["expert"])) != experts:
        raise DamagedCacheError("it has an expert twice")
    return layout, table


def _of_place(directory: int, place: str) -> list[str]:
    """Names of whole files of a place."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries]
    return [n for n in names if n.startswith(f"{place}-") and n.endswith(".packed")]


def _remove_abandoned(directory: int) -> None:
    """Remove what writers have left behind that were killed."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process was faster
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - TEMPORARY_S:
                        os.unlink(entry.name, dir_fd=directory)


def _unlink(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
