"""The public GGUF vulnerabilities of 2025 and 2026, a tiny file each: refused by name.

Each file breaks what the advisory says; what it did to other readers stands beside it. Three others
concern no file's structure: CVE-2026-21869 (a parameter of llama.cpp's server), CVE-2026-5760
(SGLang rendered a chat template outside a sandbox; Transformers renders in one) and CVE-2025-49847
(a token longer than 2^31 bytes, which is no length that is read here: no vocabulary is kept).
"""

from __future__ import annotations

import resource
import struct
import tracemalloc
from pathlib import Path

import pytest

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_header import read_gguf_header
from tests.loaders.gguf.files import (
    ARRAY,
    INT8,
    STRING,
    UINT8,
    UINT32,
    Entry,
    GgufFile,
    array,
    scalar,
    text,
)

F32, F16, Q4_0 = 0, 1, 2
ONE = GgufFile(keys=(("general.architecture", scalar(STRING, "llama")),))


def tensor(shape: tuple[int, ...], kind: int = F32, offset: int = 0, data: int = 64) -> GgufFile:
    """A file with one tensor as stated, and `data` bytes."""
    return GgufFile(keys=ONE.keys, tensors=(Entry("t", shape, kind, bytes(data), offset),))


def raw_tensor(name: bytes, num_axes: int, rest: bytes = b"") -> bytes:
    """A file with one tensor whose axes are only counted."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    return head + text(name) + struct.pack("<I", num_axes) + rest


def padded_sizes() -> GgufFile:
    """Sizes of tensors whose padded sum wraps to 64 bytes in 64 bits."""
    half = Entry("a", (1 << 61,), F32, bytes(64), 0)
    rest = Entry("b", ((1 << 61) + 16,), F32, b"", (1 << 63) + 64)
    return GgufFile(keys=ONE.keys, tensors=(half, rest))


FILES: dict[str, tuple[GgufFile | bytes, str]] = {
    # the sum of padded sizes wrapped: too small an allocation, then read into (llama.cpp)
    "CVE-2025-53630": (padded_sizes(), "a in .*: truncated"),
    # its bypass: tensors times the overhead of one, added to the sizes, wrapped (llama.cpp)
    "CVE-2026-27940": (
        GgufFile(keys=ONE.keys, num_tensors=(1 << 64) // 368), "tensors, at most 65536"
    ),
    # the bytes of one tensor wrapped in ggml_nbytes: exabytes in 4 MB (GHSA-96jg-mvhq-q7q7)
    "CVE-2026-33298": (tensor((1 << 20, 1 << 21, 1 << 21), Q4_0, data=4096), "t in .*: truncated"),
    # offset and size beyond the file were read from the heap ("Bleeding Llama", Ollama)
    "CVE-2026-7482, size": (tensor((1 << 20,), F16), "t in .*: truncated"),
    "CVE-2026-7482, offset": (tensor((16,), F32, offset=1 << 20), "t in .*: truncated"),
    # dimensions cut to 32 bits before a buffer was sized by them (vLLM)
    "CVE-2026-53923": (tensor(((1 << 32) + 16,), F32), "t in .*: truncated"),
    # gguf-py took any number of axes, and a product that wraps to 4 (llama.cpp 25378)
    "gguf-py 25378, axes": (raw_tensor(b"t", 1_000_000, bytes(16)), "t in .*: 1000000 axes"),
    "gguf-py 25378, product": (tensor((4194305, 4194305, 211106198978564)), "t in .*: truncated"),
    # gguf-py walked an array of 2^63 elements (llama.cpp 27188)
    "gguf-py 27188, array": (
        ONE.with_key("k", struct.pack("<IIQ", ARRAY, UINT8, 1 << 63)), "truncated: k"
    ),
    "gguf-py 27188, keys": (GgufFile(num_keys=1 << 63), "keys, at most 65536"),
    "gguf-py 27188, tensors": (GgufFile(num_tensors=1 << 63), "tensors, at most 65536"),
    # a string of any stated length was allocated before it was read (llama.cpp 19003)
    "llama.cpp 19003": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60) + bytes(32),
        "key 0 has 1152921504606846976 bytes",
    ),
    # a small file that asked for gigabytes (ggml 1516)
    "ggml 1516": (
        ONE.with_key("k", struct.pack("<IIQ", ARRAY, STRING, 1 << 32) + bytes(64)), "truncated: k"
    ),
    # padding to an alignment of 2 GiB wraps in 32 bits; one of another type stopped the process
    "llama.cpp 24997": (
        ONE.with_key("general.alignment", scalar(UINT32, 1 << 31)), "general.alignment"
    ),
    "llama.cpp 26318": (ONE.with_key("general.alignment", scalar(INT8, -32)), "general.alignment"),
    "alignment of no integer": (
        ONE.with_key("general.alignment", array(UINT32, [32])), "general.alignment"
    ),
    # an entry of an array of dimensions was written behind it (gguf-tools 25)
    "gguf-tools 25": (raw_tensor(b"t", 9, bytes(8 * 9 + 12)), "t in .*: 9 axes"),
    # a type below zero, as an index into the table of types (llama.cpp 19856)
    "llama.cpp 19856": (tensor((16,), kind=0xFFFFFFFF), "ggml type 4294967295 is not known"),
}  # fmt: skip
"""Advisory -> the file, and what the message says."""


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_known_vulnerability_is_refused(name: str, tmp_path: Path) -> None:
    """With an error that names the file and the key or tensor, in little memory."""
    bad, message = FILES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(bad if isinstance(bad, bytes) else bad.content())
    assert path.stat().st_size < 1 << 14
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_gguf_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    # the file, Python's objects of it, and the message: nothing of a stated size
    assert peak < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
