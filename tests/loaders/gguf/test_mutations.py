"""Changed headers: what is accepted the `gguf` library reads with the same values, and nothing but
`CheckpointError` comes out of the parser, in memory bounded by the file."""

from __future__ import annotations

import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_header import read_gguf_header
from tests.loaders.gguf.files import (
    STRING,
    UINT32,
    Entry,
    GgufFile,
    array,
    entry,
    scalar,
)
from tests.loaders.gguf.test_header import check_against_library

SHORT = GgufFile(
    keys=(
        ("general.architecture", scalar(STRING, "llama")),
        ("general.alignment", scalar(UINT32, 32)),
        ("a", array(UINT32, [1, 2, 3])),
        ("b", array(STRING, ["x", "yz"])),
    ),
    tensors=(entry("t", (2, 32), "Q8_0"), entry("u", (3, 5)), entry("v", (256,), "Q4_K")),
)
BOUNDARIES = (0, 1, 2, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 61, (1 << 63) - 1)
numbers = st.sampled_from(BOUNDARIES) | st.integers(0, (1 << 64) - 1)


@st.composite
def changed_fields(draw: st.DrawFn) -> bytes:
    """A file with one statement changed: a shape, a type, an offset, a count, an alignment."""
    number = draw(st.integers(0, len(SHORT.tensors) - 1))
    tensor = SHORT.tensors[number]
    field = draw(st.sampled_from(("shape", "kind", "offset", "counts", "alignment", "name")))
    file = SHORT
    if field == "shape":
        shape = tuple(draw(st.lists(numbers, max_size=5)))
        tensor = replace(tensor, shape=shape)
    elif field == "kind":
        tensor = replace(tensor, kind=draw(st.integers(0, 50)))
    elif field == "offset":
        tensor = replace(tensor, offset=draw(st.integers(0, 16).map(lambda n: 32 * n) | numbers))
    elif field == "counts":
        file = replace(file, num_keys=draw(numbers), num_tensors=draw(numbers))
    elif field == "alignment":
        value = scalar(UINT32, draw(st.sampled_from((1, 2, 8, 16, 48, 64, 0, 1 << 31))))
        keys = tuple((k, value if k == "general.alignment" else v) for k, v in file.keys)
        file = replace(file, keys=keys)
    else:
        tensor = replace(tensor, name=draw(st.text(max_size=4)))
    tensors: list[Entry] = list(file.tensors)
    tensors[number] = tensor
    return replace(file, tensors=tuple(tensors)).content()


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A file with a few bytes of its header changed, or cut or continued."""
    content = bytearray(SHORT.content())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 420))
        content[at % len(content)] = draw(st.sampled_from((0, 1, 7, 9, 127, 128, 255)))
    length = draw(st.integers(0, len(content)) | st.just(len(content)))
    return bytes(content[:length]) + draw(st.binary(max_size=40))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changed_fields() | changed_bytes())
def test_a_changed_header(content: bytes) -> None:
    """Refused by name, or read as the library reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            header = read_gguf_header(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            return
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # Python's objects of a header of some 500 bytes; what it states is far larger
            assert peak < 1 << 20
        check_against_library(header)


def test_the_unchanged_file_is_read(tmp_path: Path) -> None:
    """Else nothing above would get past the header."""
    header = read_gguf_header(SHORT.write(tmp_path / "model.gguf"))
    assert len(header.tensors) == 3
    check_against_library(header)
