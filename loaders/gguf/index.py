"""All tensors of a GGUF model by key, over all its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_header import BlockTensor, GgufHeader, read_gguf_header
from hybrid_moe.loaders.gguf.header_bytes import Value
from hybrid_moe.loaders.gguf.names import key_of
from hybrid_moe.loaders.gguf.splits import check_split, gguf_files
from hybrid_moe.loaders.regular import Stamp, stamp_of
from hybrid_moe.loaders.safetensors import SafetensorsIndex
from hybrid_moe.parallel import map_all

_SCAN_THREADS = 8  # as for safetensors: latency of a cold or remote disk


class GgufIndex(SafetensorsIndex):
    """The tensors of one GGUF model. Data is read as that of safetensors is; what is read of blocks
    is rows of bytes.

    Attributes:
        metadata: of the first file.
        files: all of them, in order.
    """

    def __init__(
        self, path: Path, headers: Sequence[GgufHeader], stamps: Mapping[Path, Stamp | None]
    ) -> None:
        self.metadata: Mapping[str, Value] = MappingProxyType(dict(headers[0].metadata))
        self.files = tuple(header.file for header in headers)
        super().__init__(path, _all_tensors(headers))
        found = {header.file: header.stamp for header in headers}
        self.stamps = MappingProxyType({**stamps, **found})

    @classmethod
    def open_gguf(cls, path: Path) -> GgufIndex:
        """Scan the headers of the model at `path`, a file or a folder with one model.

        Raises:
            CheckpointError: no or several models there, a file is missing, or a header breaks a
                rule; or files do not belong together.
        """
        stamps = {path: stamp_of(path)}
        files = gguf_files(path)
        if not files:
            raise CheckpointError(f"{path}: no *.gguf file in this directory")
        headers = list(map_all(read_gguf_header, files, min(_SCAN_THREADS, len(files))))
        check_split(headers)
        return cls(path, headers, stamps if path.is_dir() else {})

    def info(self, key: str) -> BlockTensor:
        """Where `key` lies. Raises `CheckpointError` where there is no such tensor."""
        tensor = super().info(key)
        assert isinstance(tensor, BlockTensor)
        return tensor


def _all_tensors(headers: Sequence[GgufHeader]) -> dict[str, BlockTensor]:
    tensors: dict[str, BlockTensor] = {}
    for header in headers:
        for tensor in header.tensors:
            named = replace(tensor, key=key_of(tensor.stored_name))
            other = tensors.setdefault(named.key, named)
            if other is not named:
                raise CheckpointError(
                    f"{named.where}: there is {other.where} already, which is the same tensor"
                )
    return tensors
