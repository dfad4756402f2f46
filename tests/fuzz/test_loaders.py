"""The fuzzing of the loaders in small: inputs of a fixed seed, and some that hypothesis chooses."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import header
from hybrid_moe.loaders.header import read_header
from hybrid_moe.loaders.regular import read_json
from tests.fuzz import folders, headers, layers
from tests.fuzz.loaders import run

randoms = st.randoms(use_true_random=False)
few = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("count", [3_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_inputs_of_a_seed(count: int, tmp_path: Path) -> None:
    """The same ones each time; `make fuzz` has others."""
    report = run(first=0, count=count, seed=0, folder=tmp_path)
    assert not report.failures, report.failures[0][2]
    # Inputs must be worth something: most kinds get through about half of the time.
    for kind, inputs in report.inputs.items():
        assert 0.1 < report.accepted[kind] / inputs < 0.9, report


@few
@given(rng=randoms)
def test_headers(rng: Random) -> None:
    headers.check(headers.generate(rng))


@few
@given(content=st.binary(max_size=100))
def test_any_text_as_a_header(content: bytes) -> None:
    headers.check(struct.pack("<Q", len(content)) + content)


@few
@given(rng=randoms)
def test_layers(rng: Random) -> None:
    layers.check(layers.generate(rng))


@few
@given(rng=randoms)
def test_folders(rng: Random, tmp_path: Path) -> None:
    folders.check_folder(rng, tmp_path / "folder")
    folders.check_json(rng, tmp_path)


def of_one_byte(key: str = "w", shape: str = "[1]", more: str = "", dtype: str = '"U8"') -> str:
    return f'{{"{key}":{{"dtype":{dtype},"shape":{shape},"data_offsets":[0,1]{more}}}}}'


ACCEPTED_ELSEWHERE = {
    "key twice": '{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' + of_one_byte()[1:],
    "long key": of_one_byte(key="x" * 1025),
    "unknown field twice": of_one_byte(more=',"x":1,"x":1'),
    "long entry": of_one_byte(more=" " * 4096),
    "entry as a list": '{"w":["U8",[1],[0,1]]}',
    "unknown field": of_one_byte(more=',"x":1'),
    "dtype as an object": of_one_byte(dtype='{"U8":null}'),
    "many axes": of_one_byte(shape="[1,1,1,1,1,1,1,1,1]"),
    "huge empty shape": of_one_byte()[:-1]
    + ',"v":{"dtype":"U8","shape":[0,9223372036854775807,2],"data_offsets":[1,1]}}',
    "row that ends within a byte": of_one_byte(shape="[2,1]", dtype='"F4"'),
}


@pytest.mark.parametrize("reason", headers.REASONS)
def test_what_only_the_official_parser_accepts(reason: str) -> None:
    text = ACCEPTED_ELSEWHERE[reason].encode()
    file = struct.pack("<Q", len(text)) + text + b"x"
    assert deserialize(file)
    assert not headers.check(file)
    with pytest.raises(CheckpointError) as caught:
        headers.parse(file)
    assert headers.why_refused(str(caught.value)) == reason


SIZE = 1 << 19
ENTRY = '"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
HOSTILE: dict[str, str] = {
    "empty lists": "[" + "[]," * (SIZE // 3),
    "a list in an entry": '{"w":{"shape":[' + "[]," * (SIZE // 3),
    "a long shape": '{"w":{"shape":[' + "9223372036854775807," * (SIZE // 20),
    "one number": '{"w":{"shape":[' + "9" * SIZE,
    "a long text": '{"w":{"dtype":"' + "x" * SIZE,
    "objects": '{"w":' + '{"":' * (SIZE // 4),
    "lists": "[" * SIZE,
    "metadata": '{"__metadata__":{"a":' + "[]," * (SIZE // 3),
    "texts of metadata": '{"__metadata__":{' + ('"a":"' + "b" * 50 + '",') * (SIZE // 57),
    "spaces": "{" + " " * SIZE,
    "wide characters": '{"w":{"dtype":"😀' + "x" * SIZE,
    "a wrong entry at the end": "{" + "".join(ENTRY % n for n in range(SIZE // 60)) + '"x":3}',
}


def bytes_at_most(text: str) -> int:
    """Bytes that a header may cost: itself, its text (where one character is wide, 4 bytes each
    and, while it is decoded, 1 more), and for each entry a TensorInfo, key, shape, and its place
    in a list and a set: 400 bytes. The rest is for 8 threads and files."""
    per_character = 1 if text.isascii() else 5
    size = len(text.encode())
    return size * (1 + per_character) + 400 * text.count('"dtype"') + (1 << 18)


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_is_bounded_by_the_header(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight files at once, as many as are scanned together, cost what one costs."""
    monkeypatch.setattr(header, "_LARGE_HEADER", SIZE // 2)
    text = HOSTILE[name].encode()
    files = [tmp_path / f"{n}.safetensors" for n in range(8)]
    for file in files:
        file.write_bytes(struct.pack("<Q", len(text)) + text)

    def scan(file: Path) -> int:
        try:
            read_header(file)
        except CheckpointError as error:
            return len(str(error))
        raise AssertionError("a hostile header was read")

    tracemalloc.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            lengths = list(pool.map(scan, files))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(lengths) < 1000
    assert peak < bytes_at_most(HOSTILE[name])


@pytest.mark.parametrize("reason", folders.JSON_REASONS)
def test_json_that_is_refused(reason: str, tmp_path: Path) -> None:
    texts = {"NaN": '{"a": NaN}', "two values": '{"a": 1, "a": 2}', "no object": "[]"}
    json.loads(texts[reason])
    (tmp_path / "config.json").write_text(texts[reason])
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json")
    assert re.search(folders.JSON_REASONS[reason], str(caught.value))
