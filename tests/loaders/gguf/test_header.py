"""The parser of GGUF headers, with the `gguf` library as its oracle."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_header import GgufHeader, read_gguf_header
from hybrid_moe.loaders.gguf.header_bytes import KEPT_ARRAY, LeftOut
from tests.loaders.gguf.files import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Entry,
    GgufFile,
    array,
    entry,
    scalar,
    text,
)

F32 = 0
GOOD = GgufFile(
    keys=(
        ("general.architecture", scalar(STRING, "qwen3moe")),
        ("a.u8", scalar(UINT8, 255)),
        ("a.i8", scalar(INT8, -128)),
        ("a.u16", scalar(UINT16, 65535)),
        ("a.i16", scalar(INT16, -32768)),
        ("a.u32", scalar(UINT32, 4294967295)),
        ("a.i32", scalar(INT32, -5)),
        ("a.f32", scalar(FLOAT32, 1.5)),
        ("a.yes", scalar(BOOL, 1)),
        ("a.no", scalar(BOOL, 0)),
        ("a.u64", scalar(UINT64, 2**64 - 1)),
        ("a.i64", scalar(11, -(2**63))),
        ("a.f64", scalar(12, 0.1)),
        ("a.empty", scalar(STRING, "")),
        ("a.wörd", scalar(STRING, "naïve ▁")),
        ("a.layers", array(INT32, [8, 0, 8])),
        ("a.bools", array(BOOL, [1, 0])),
        ("a.none", array(FLOAT32, [])),
        ("tokenizer.ggml.tokens", array(STRING, ["", "a", "▁b"] * 2000)),
        ("tokenizer.ggml.scores", array(FLOAT32, [0.5] * (KEPT_ARRAY + 1))),
    ),
    tensors=(
        entry("token_embd.weight", (7, 32), "Q8_0"),
        entry("blk.0.attn_norm.weight", (33,), "F32"),
        entry("blk.0.ffn_up_exps.weight", (3, 5, 256), "Q4_K"),
        entry("blk.0.ffn_down_exps.weight", (3, 2, 5, 96), "MXFP4"),
    ),
)


def read(file: GgufFile, path: Path) -> GgufHeader:
    """Write and parse a file."""
    return read_gguf_header(file.write(path / "model.gguf"))


def check_against_library(header: GgufHeader) -> None:
    """Raise where the library reads anything else."""
    reader = gguf.GGUFReader(header.file)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(fields) == list(header.metadata)
    for key, value in header.metadata.items():
        found: Any = fields[key].contents()
        if isinstance(value, LeftOut):
            assert len(found) == value.count
            assert fields[key].types[-1].name.lower() == value.kind
        else:
            assert (list(value) if isinstance(value, tuple) else value) == found
            assert type(value) is not bool or fields[key].types[-1].name == "BOOL"
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert set(theirs) == {tensor.stored_name for tensor in header.tensors}
    content = header.file.read_bytes()
    for tensor in header.tensors:
        other = theirs[tensor.stored_name]
        assert tensor.dtype == other.tensor_type.name
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert (tensor.offset, tensor.nbytes) == (other.data_offset, other.n_bytes)
        assert tensor.raw_shape == other.data.shape
        data = content[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == other.data.tobytes()
        ours = np.frombuffer(data, tensor.raw_dtype).reshape(tensor.raw_shape)
        assert ours.shape == other.data.shape


@pytest.mark.parametrize(
    "file",
    [
        GOOD,
        replace(GOOD, version=2),
        replace(GOOD, tensors=()),
        GgufFile(),
        replace(GOOD, alignment=64).with_key("general.alignment", scalar(UINT32, 64)),
        replace(GOOD, alignment=1).with_key("general.alignment", scalar(UINT32, 1)),
        replace(
            GOOD, tensors=(replace(GOOD.tensors[0], offset=160), replace(GOOD.tensors[1], offset=0))
        ),
    ],
    ids=["good", "version 2", "no tensors", "nothing", "alignment 64", "alignment 1", "disorder"],
)
def test_what_is_read_the_library_reads(file: GgufFile, tmp_path: Path) -> None:
    """Keys, values, tensors and their bytes."""
    check_against_library(read(file, tmp_path))


def test_data_may_end_without_padding(tmp_path: Path) -> None:
    """Some writers leave the last tensor's padding out."""
    path = tmp_path / "model.gguf"
    content = replace(GOOD, tensors=(entry("a", (33,)),)).content()
    path.write_bytes(content[: -len(content) % 32 or None][: len(content) - 28])
    check_against_library(read_gguf_header(path))


def test_a_large_header_is_read_in_pieces(tmp_path: Path) -> None:
    """A vocabulary of more than what is read at a time."""
    tokens = [f"token{number}" for number in range(60_000)]
    header = read(GOOD.with_key("more", array(STRING, tokens)), tmp_path)
    assert header.metadata["more"] == LeftOut("string", 60_000)
    check_against_library(header)


ONE = replace(GOOD, keys=GOOD.keys[:1])
HUGE = 2**63
BAD: dict[str, tuple[GgufFile | bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "magic": (replace(ONE, magic=b"GGML"), "no GGUF file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "no GGUF file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    "ends in version": (b"GGUF\3", "truncated: version"),
    "version 1": (replace(ONE, version=1), "version 1 of GGUF"),
    "version 4": (replace(ONE, version=4), "version 4 of GGUF"),
    "big-endian": (replace(ONE, version=3 << 24), "big-endian"),
    "keys": (replace(ONE, num_keys=HUGE), f"{HUGE} keys, at most 65536"),
    "tensors": (replace(ONE, num_tensors=HUGE), f"{HUGE} tensors, at most 65536"),
    "more keys than bytes": (replace(ONE, num_keys=65000), "truncated: 65000 keys"),
    "more tensors than bytes": (replace(ONE, num_tensors=65000), "truncated: 65000 tensors"),
    "key twice": (ONE.with_key(*ONE.keys[0]), "key 'general.architecture' appears twice"),
    "key empty": (ONE.with_key("", scalar(UINT8, 1)), "key '' number 1 is empty"),
    "key too long": (ONE.with_key("k" * 70_000, scalar(UINT8, 1)), "key 1 has 70000 bytes"),
    "key no UTF-8": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff") + scalar(UINT8, 1),
        "key 0.*no UTF-8",
    ),
    "value no UTF-8": (ONE.with_key("b", scalar(STRING, b"\xff")), "b, .*no UTF-8"),
    "type of a value": (ONE.with_key("b", struct.pack("<I", 13) + bytes(8)), "b has a value of ty"),
    "bool": (ONE.with_key("b", scalar(BOOL, 2)), "b is a bool of 2"),
    "bool in an array": (ONE.with_key("b", array(BOOL, [1, 3])), "b is a bool of 3"),
    "array of arrays": (
        ONE.with_key("b", struct.pack("<IIQ", ARRAY, ARRAY, 1) + array(UINT8, [1])),
        "b is an array of arrays",
    ),
    "string ends": (
        ONE.with_key("b", struct.pack("<IQ", STRING, HUGE)), "truncated: b should end at byte 9"
    ),
    "long string ends": (ONE.with_key("b", struct.pack("<IQ", STRING, 1 << 30)), "truncated: b"),
    "array ends": (ONE.with_key("b", struct.pack("<IIQ", ARRAY, UINT64, HUGE)), "truncated: b"),
    "array of strings": (
        ONE.with_key("b", struct.pack("<IIQ", ARRAY, STRING, HUGE)), "truncated: b"
    ),
    "string in an array ends": (
        ONE.with_key("b", struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE)), "truncated: b"
    ),
    "array of no type": (ONE.with_key("b", struct.pack("<IIQ", ARRAY, 99, 0)), "a value of t"),
    "alignment 0": (ONE.with_key("general.alignment", scalar(UINT32, 0)), "general.alignment is 0"),
    "alignment 48": (ONE.with_key("general.alignment", scalar(UINT32, 48)), "alignment is 48"),
    "alignment a bool": (ONE.with_key("general.alignment", scalar(BOOL, 1)), "is of type 7"),
    "alignment a byte": (
        ONE.with_key("general.alignment", scalar(UINT8, 32)), "alignment is of type 0"
    ),
    "alignment 2 GiB": (
        ONE.with_key("general.alignment", scalar(UINT32, 1 << 31)), "alignment is 2147483648"
    ),
    "name twice": (
        replace(ONE, tensors=(entry("a", (8,)), entry("a", (8,)))), "tensor 'a' appears twice"
    ),
    "name empty": (replace(ONE, tensors=(entry("", (8,)),)), "number 0 has no name"),
    "name too long": (replace(ONE, tensors=(entry("n" * 1025, (8,)),)), "1025 bytes"),
    "no axes": (replace(ONE, tensors=(Entry("a", (), F32, bytes(4)),)), r"a in .*shape \(\)"),
    "five axes": (replace(ONE, tensors=(Entry("a", (1,) * 5, F32, bytes(4)),)), "a in .*: 5 axes"),
    "an axis of 0": (replace(ONE, tensors=(Entry("a", (2, 0), F32),)), r"shape \(2, 0\)"),
    "type 99": (replace(ONE, tensors=(Entry("a", (8,), 99, bytes(32)),)), "ggml type 99 is not kn"),
    "type removed": (replace(ONE, tensors=(Entry("a", (8,), 4, bytes(32)),)), "type 4 was removed"),
    "part of a block": (
        replace(ONE, tensors=(Entry("a", (2, 48), 8, bytes(102)),)), "rows of 48 weights .* Q8_0"
    ),
    "not aligned": (replace(ONE, tensors=(Entry("a", (8,), F32, bytes(64), 16),)), "offset 16 is"),
    "overlap": (
        replace(ONE, tensors=(entry("a", (16,)), replace(entry("b", (16,)), offset=32))),
        "b in .*overlaps",
    ),
    "same place": (
        replace(ONE, tensors=(entry("a", (16,)), replace(entry("b", (16,)), offset=0))), "overlaps"
    ),
    "hole": (
        replace(ONE, tensors=(entry("a", (8,)), Entry("b", (8,), F32, bytes(96), 64))),
        "b in .*follows a hole",
    ),
    "hole at the start": (replace(ONE, tensors=(Entry("a", (8,), F32, bytes(96), 64),)), "hole"),
    "bytes behind": (replace(ONE, after=bytes(33)), "bytes behind the last tensor"),
    "data ends": (replace(ONE, tensors=(Entry("a", (64,), F32, bytes(32)),)), "a in .*: truncated"),
}  # fmt: skip
"""By name: what is wrong, and what the message says of it."""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused(name: str, tmp_path: Path) -> None:
    """By a message that names the file, and the key or tensor."""
    bad, message = BAD[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(bad if isinstance(bad, bytes) else bad.content())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    """Cut anywhere but in the last padding, a file is told to be cut."""
    tensors = (entry("blk.0.ffn_up_exps.weight", (1, 32), "Q8_0"),)
    content = replace(GOOD, keys=GOOD.keys[:18], tensors=tensors).content()
    whole = len(content) - (-34 % 32)
    path = tmp_path / "model.gguf"
    for length in range(whole):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"truncated|no GGUF file"):
            read_gguf_header(path)
    path.write_bytes(content[:whole])
    read_gguf_header(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A folder, and nothing at all."""
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointError, match="no regular file"):
            read_gguf_header(path)
