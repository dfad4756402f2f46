"""Reading safetensors: what the official library wrote comes back; anything else is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save, save_file

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import SafetensorsIndex
from hybrid_moe.loaders.files import INDEX_NAME
from hybrid_moe.loaders.safetensors import ReadBuffer

DTYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]

tensor_sets = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
        lambda key: key != "__metadata__"
    ),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(
            dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
        )
    ),
    min_size=1,
    max_size=5,
)
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@one_folder
@given(tensors=tensor_sets)
def test_round_trip(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(save(tensors))
    index = SafetensorsIndex.open(file)
    assert set(index.tensors) == set(tensors)
    for key, expected in tensors.items():
        array = index.read(key)
        assert array.shape == expected.shape and array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()
    index.close()


@pytest.mark.parametrize(
    ("dtype", "name", "raw"),
    [
        (ml_dtypes.bfloat16, "BF16", np.uint16),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3", np.uint8),
        (ml_dtypes.float8_e5m2, "F8_E5M2", np.uint8),
    ],
)
def test_dtypes_that_numpy_lacks(dtype: Any, name: str, raw: Any, tmp_path: Path) -> None:
    expected = np.arange(6).astype(dtype).reshape(2, 3)
    save_file({"w": expected}, tmp_path / "model.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    assert index.info("w").dtype == name
    assert index.read("w").dtype == raw
    assert np.array_equal(index.read("w").view(dtype), expected)


def test_half_bytes(tmp_path: Path) -> None:
    raw_file(tmp_path / "m.safetensors", {"w": entry("F4", [2, 6], 0, 6)}, bytes(range(6)))
    array = SafetensorsIndex.open(tmp_path).read("w", slice(1, 2))
    assert array.shape == (1, 3) and array.dtype == np.uint8
    assert array.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, 7), slice(6, 6), slice(-1, None), slice(9)])
def test_rows(rows: slice, tmp_path: Path) -> None:
    expected = np.random.default_rng(0).standard_normal((7, 3, 2)).astype(np.float32)
    save_file({"a": np.zeros(3), "w": expected}, tmp_path / "m.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    assert np.array_equal(index.read("w", rows), expected[rows])
    buffer = np.zeros(1000, np.uint8)
    array = index.read("w", rows, buffer)
    assert np.array_equal(array, expected[rows])
    assert array.size == 0 or np.shares_memory(array, buffer)


@pytest.mark.parametrize(
    ("rows", "out", "message"),
    [
        (slice(0, 2, 2), None, "step 1"),
        (None, np.zeros(11, np.uint8), "12 bytes"),
        (None, np.zeros(12, np.int8), "uint8"),
        (None, np.zeros((12, 2), np.uint8)[:, 0], "contiguous"),
    ],
)
def test_bad_rows_and_buffers(rows: Any, out: Any, message: str, tmp_path: Path) -> None:
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        SafetensorsIndex.open(tmp_path).read("w", rows, out)


def test_buffers_are_reused() -> None:
    buffer = ReadBuffer()
    buffer.reset([1000])
    first, second = buffer.take(100), buffer.take(64)
    first[:], second[:] = 1, 2
    assert not np.shares_memory(first, second) and first.sum() == 100
    too_much = buffer.take(2000)
    assert len(too_much) == 2000 and not np.shares_memory(too_much, first)
    buffer.reset([500])
    assert np.shares_memory(buffer.take(10), first)


def sharded(path: Path) -> Path:
    save_file({"a": np.arange(3), "b": np.arange(4)}, path / "model-1.safetensors")
    save_file({"c": np.arange(5)}, path / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
    index = {"metadata": {}, "weight_map": {**weight_map, "c": "model-2.safetensors"}}
    (path / INDEX_NAME).write_text(json.dumps(index))
    return path


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    assert {key: tensor.file.name for key, tensor in index.tensors.items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    assert index.read("c").tolist() == [0, 1, 2, 3, 4]


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        index = json.loads((path / INDEX_NAME).read_text())
        change(index)
        (path / INDEX_NAME).write_text(json.dumps(index))

    return apply


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (
        lambda path: (path / "model-2.safetensors").unlink(),
        r"model-2\.safetensors: this shard is missing.* 1 tensors, among them c",
    ),
    "truncated shard": (
        lambda path: (path / "model-2.safetensors").write_bytes(
            (path / "model-2.safetensors").read_bytes()[:-1]
        ),
        r"c in .*model-2\.safetensors: truncated",
    ),
    "index is no JSON": (
        lambda path: (path / INDEX_NAME).write_text("{"),
        rf"{INDEX_NAME}: damaged: Expecting property name",
    ),
    "index without weight_map": (edit_index(lambda index: index.pop("weight_map")), "weight_map"),
    "empty weight_map": (edit_index(lambda index: index.update(weight_map={})), "weight_map"),
    "index leads outside": (
        edit_index(lambda index: index["weight_map"].update(a="../model-1.safetensors")),
        r"a is in '\.\./model-1\.safetensors', which is no file name",
    ),
    "index names no file": (
        edit_index(lambda index: index["weight_map"].update(a="")),
        r"a is in '', which is no file name",
    ),
    "index names the folder above": (
        edit_index(lambda index: index["weight_map"].update(a="..")),
        r"a is in '\.\.', which is no file name",
    ),
    "index names the wrong shard": (
        edit_index(lambda index: index["weight_map"].update(a="model-2.safetensors")),
        r"a: .*says that it is in .*model-2\.safetensors, but it is not",
    ),
    "index names an unknown tensor": (
        edit_index(lambda index: index["weight_map"].update(d="model-2.safetensors")),
        r"d: .*says that it is in",
    ),
    "tensor in two shards": (
        lambda path: (
            save_file({"b": np.zeros(1)}, path / "model-3.safetensors"),
            (path / INDEX_NAME).unlink(),
        ),
        r"b: in .*model-1\.safetensors and again in .*model-3\.safetensors",
    ),
    "pipe as a shard": (
        lambda path: (
            (path / INDEX_NAME).unlink(),
            (path / "model-1.safetensors").unlink(),
            os.mkfifo(path / "model-1.safetensors"),
        ),
        r"model-1\.safetensors: no regular file",
    ),
    "folder as a shard": (
        lambda path: ((path / INDEX_NAME).unlink(), (path / "x.safetensors").mkdir()),
        r"x\.safetensors: no regular file",
    ),
    "dangling link": (
        lambda path: (
            (path / INDEX_NAME).unlink(),
            (path / "x.safetensors").symlink_to(path / "gone"),
        ),
        r"x\.safetensors: no regular file",
    ),
    "no shards": (
        lambda path: [file.unlink() for file in path.iterdir()],
        r"no \*\.safetensors file",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(name: str, tmp_path: Path) -> None:
    damage, message = BAD_FOLDERS[name]
    damage(sharded(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsIndex.open(tmp_path)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        SafetensorsIndex.open(tmp_path / "nowhere")


W = {"w": entry("F32", [2], 0, 8)}
EIGHT = bytes(8)
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few"),
    "no header": (b"1234567", "too few"),
    "no safetensors": (b"GGUF" * 100, "exceeds the format's limit"),
    "header beyond the end": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "exceeds the format's limit"),
}
BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "garbage": (b"\x00\xff{{{", b"", "header is damaged"),
    "bad UTF-8": (b'{"\xff": 1}', b"", "header is damaged"),
    "cut JSON": (b'{"w": {', b"", "header is damaged"),
    "nested JSON": (b"[" * 100_000, b"", "header is damaged"),
    "no object": ([1, 2], b"", "no JSON object"),
    "key twice": (
        b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "w": {}}',
        b"",
        "key 'w' appears twice",
    ),
    "entry is no object": ({"w": 3}, b"", "w in .*no JSON object"),
    "unknown dtype": ({"w": entry("F128", [2], 0, 8)}, EIGHT, "w in .*unknown dtype 'F128'"),
    "no dtype": ({"w": {"shape": [], "data_offsets": [0, 0]}}, b"", "unknown dtype None"),
    "negative shape": ({"w": entry("F32", [-2], 0, 8)}, EIGHT, "no list of sizes"),
    "shape of text": ({"w": {**W["w"], "shape": "2"}}, EIGHT, "no list of sizes"),
    "shape of booleans": ({"w": {**W["w"], "shape": [True, 2]}}, EIGHT, "no list of sizes"),
    "one offset": ({"w": {**W["w"], "data_offsets": [0]}}, EIGHT, r"no \[begin, end\]"),
    "offsets swapped": ({"w": {**W["w"], "data_offsets": [8, 0]}}, EIGHT, r"no \[begin, end\]"),
    "beyond the end": (W, bytes(7), "truncated"),
    "size and shape differ": ({"w": entry("F32", [3], 0, 8)}, EIGHT, "8 bytes of data do not fit"),
    "half bytes left": ({"w": entry("F4", [2, 3], 0, 3)}, bytes(3), "end within a byte"),
    "huge shape": ({"w": entry("F32", [1 << 62, 4], 0, 8)}, EIGHT, "no tensor of dtype F32 has"),
    "overlap": ({**W, "v": entry("F32", [1], 4, 8)}, EIGHT, "v in .*overlaps"),
    "hole": ({"w": entry("F32", [1], 4, 8)}, EIGHT, "w in .*follows a hole"),
    "bytes left over": (W, bytes(9), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: .*{message}"):
        SafetensorsIndex.open(tmp_path)


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[name]
    file = raw_file(tmp_path / "m.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsIndex.open(tmp_path)
    assert str(file) in str(caught.value)


@one_folder
@given(data=st.data())
def test_a_changed_byte_is_noticed_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(save({"w": np.zeros((2, 3), np.float32), "v": np.zeros(5, np.int8)}))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    try:
        index = SafetensorsIndex.open(file)
    except CheckpointError:
        return
    assert sum(index.read(key).nbytes for key in index.tensors) == 29


@one_folder
@given(cut=st.integers(1, 10_000))
def test_a_cut_file_is_always_noticed(cut: int, tmp_path: Path) -> None:
    content = save({"w": np.zeros((20, 30), np.float32)})
    file = tmp_path / "m.safetensors"
    file.write_bytes(content[: max(0, len(content) - cut)])
    with pytest.raises(CheckpointError):
        SafetensorsIndex.open(file)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """Under a mapping this would be SIGBUS."""
    file = tmp_path / "m.safetensors"
    save_file({"w": np.zeros(100_000, np.float32)}, file)
    index = SafetensorsIndex.open(file)
    index.read("w", slice(0, 1))
    with file.open("r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(CheckpointError, match=r"w in .*m\.safetensors: truncated"):
        index.read("w")


def rewrite(file: Path, values: np.ndarray) -> None:
    file.write_bytes(save({"w": values}))


def replace(file: Path, values: np.ndarray) -> None:
    rewrite(file.with_name("new"), values)
    file.with_name("new").replace(file)


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_that_changes_after_opening(
    change: Callable[[Path, np.ndarray], None], read_before: bool, tmp_path: Path
) -> None:
    """Offsets of the old header are never used on another file."""
    file = tmp_path / "m.safetensors"
    rewrite(file, np.full(50, 1.0))
    index = SafetensorsIndex.open(file)
    if read_before:
        index.read("w", slice(0, 1))
    change(file, np.full((2, 30), 2.0))
    if change is replace and read_before:  # the old file, which is open, is still whole
        assert np.array_equal(index.read("w"), np.full(50, 1.0))
        return
    with pytest.raises(CheckpointError, match=r"m\.safetensors: changed since its header was read"):
        index.read("w")


def test_missing_key(tmp_path: Path) -> None:
    index = SafetensorsIndex.open(sharded(tmp_path))
    with pytest.raises(CheckpointError, match="nothing: no such tensor in"):
        index.read("nothing")
