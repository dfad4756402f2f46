"""Safetensors files, valid and damaged, held against the official parser.

What `safetensors` refuses must be refused. What it accepts must be read alike, or be refused for
one of `REASONS`.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from safetensors import SafetensorError, deserialize

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.header import MAX_AXES, STORAGE_TYPES, TensorInfo, read_tensors
from hybrid_moe.loaders.header_text import MAX_ENTRY_LENGTH
from hybrid_moe.loaders.regular import MAX_KEY_LENGTH

REASONS = {
    "key twice": r"key .* appears twice",
    "long key": rf"key .* is longer than {MAX_KEY_LENGTH} characters",
    "unknown field twice": "a field appears twice",
    "long entry": rf"is no JSON of at most {MAX_ENTRY_LENGTH} characters",
    "entry as a list": "entry is no JSON object",
    "unknown field": "entry has an unknown field",
    "dtype as an object": r"unknown dtype \{",
    "many axes": rf"axes, at most {MAX_AXES} are read",
    "huge empty shape": "no tensor of dtype .* has the shape",
    "row that ends within a byte": "end within a byte",
}
"""Why a file that the official parser accepts may be refused, as patterns of the message."""

Field = tuple[str, str]  # name and value, as JSON text
Entry = tuple[str, list[Field] | str]  # key as JSON text; its fields, or text in their place

_NAMES = ("w", "a.b", "", "é", "\\u0061", "\\ud83d\\ude00", "\\/", "model.layers.0.mlp", "x" * 80)
_BAD_NAMES = ("\\ud800", "a\x01", "\\u12", "\x7f", "__metadata__", "x" * 1025, "\\ud800\\u0041")
_NUMBERS = (
    "0", "1", "2", "-1", "-0", "1.0", "1e2", "01", "true", "null", '"1"', "[]", "{}", "NaN",
    "Infinity", "18446744073709551615", "18446744073709551616", "9223372036854775808",
    "4611686018427387904", "1" * 30, "1" * 5000,
)  # fmt: skip
_DTYPES = ("F128", "", "f32", "F32 ", 'F\\u0033"2', "BOOL")
_VALUES = ('{"F32":null}', "null", "3", "[]", '["F32"]', '"F32', "{}")
_EXTRA = ('"x"', "1", "null", "[]", "[" * 130 + "]" * 130, "-0", "NaN", '"' + "y" * 5000 + '"')
_SPACE = ("", "", "", " ", "\n", "\t", "\r\n", "  ")
_BAD_SPACE = ("\f", "\v", "\xa0", "\ufeff", ",", "\0", "/**/")


def generate(rng: Random) -> bytes:
    """One file: valid, or with a few damages."""
    entries, data = _valid(rng)
    damages = rng.choice((0, 0, 1, 1, 1, 2, 3))
    for _ in range(damages):
        if rng.random() < 0.8:
            data = rng.choice(_STRUCTURAL)(rng, entries, data)
    text = _text(rng, entries)
    if damages and rng.random() < 0.25:
        text = _damage_text(rng, text)
    content = text.encode("utf-8", "surrogatepass")
    length = len(content) + (rng.choice((-1, 1, 8, 1 << 40)) if rng.random() < 0.01 else 0)
    file = struct.pack("<Q", max(0, length)) + content + data
    return _damage_bytes(rng, file) if damages and rng.random() < 0.15 else file


def check(file: bytes) -> bool:
    """Compare both parsers on `file`; returns whether this project's accepts it."""
    try:
        expected = dict(deserialize(file))
    except SafetensorError:
        expected = None
    try:
        tensors = parse(file)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 3 * MAX_KEY_LENGTH, "an endless message"
        assert expected is None or why_refused(message) or has_a_key_twice(file), message
        return False
    assert expected is not None, "read what safetensors refuses"
    assert len(tensors) == len(expected)
    assert {tensor.key for tensor in tensors} == set(expected)
    for tensor in tensors:
        official = expected[tensor.key]
        assert (tensor.dtype, list(tensor.shape)) == (official["dtype"], official["shape"])
        assert file[tensor.offset : tensor.offset + tensor.nbytes] == bytes(official["data"])
    return True


def parse(file: bytes) -> list[TensorInfo]:
    """The tensors of a file in memory."""
    return read_tensors(io.BytesIO(file), len(file), Path("f"))


def why_refused(message: str) -> str | None:
    """The reason of `REASONS` in the message."""
    found = (name for name, pattern in REASONS.items() if re.search(pattern, message))
    return next(found, None)


def has_a_key_twice(file: bytes) -> bool:
    """Whether a file that the official parser accepts has two entries under one key: it takes the
    last of them, and does not look at the others."""
    pairs = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")], object_pairs_hook=list)
    return len({key for key, _ in pairs}) < len(pairs)


def _valid(rng: Random) -> tuple[list[Entry], bytes]:
    entries: list[Entry] = []
    end = 0
    for number in range(rng.choice((0, 1, 1, 2, 2, 3, 5))):
        dtype = rng.choice(tuple(STORAGE_TYPES))
        shape = [rng.choice((0, 1, 2, 3, 4, 8)) for _ in range(rng.choice((0, 1, 2, 2, 3)))]
        bits = STORAGE_TYPES[dtype].bits
        if bits < 8:
            shape = [*shape, 4]
        for size in shape:
            bits *= size
        begin, end = end, end + bits // 8
        fields = [
            ("dtype", json.dumps(dtype)),
            ("shape", _list(rng, map(str, shape))),
            ("data_offsets", _list(rng, (str(begin), str(end)))),
        ]
        if rng.random() < 0.2:
            rng.shuffle(fields)
        entries.append((f'"{rng.choice(_NAMES)}{number}"', fields))
    if rng.random() < 0.3:
        rng.shuffle(entries)
    if rng.random() < 0.3:
        metadata = rng.choice(('{"format":"pt"}', "{}", '{ "a" : "b", "a" : "\\n" }', '{"é":""}'))
        entries.insert(rng.randrange(len(entries) + 1), ('"__metadata__"', metadata))
    return entries, rng.randbytes(end)


def _list(rng: Random, items: object) -> str:
    return f"[{rng.choice((',', ', ', ' , ')).join(items)}]"  # type: ignore[call-overload]


def _text(rng: Random, entries: list[Entry]) -> str:
    def space() -> str:
        return rng.choice(_SPACE) if rng.random() < 0.1 else ""

    members = []
    for key, fields in entries:
        if isinstance(fields, list):
            inner = f",{space()}".join(f'"{n}"{space()}:{space()}{value}' for n, value in fields)
            fields = f"{{{space()}{inner}{space()}}}"
        members.append(f"{key}{space()}:{space()}{fields}")
    body = f"{space()},{space()}".join(members)
    return f"{space()}{{{space()}{body}{space()}}}" + " " * rng.choice((0, 0, 7))


def _a_tensor(rng: Random, entries: list[Entry]) -> list[Field] | None:
    found = [fields for _, fields in entries if isinstance(fields, list) and fields]
    return rng.choice(found) if found else None


def _set_number(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    fields = _a_tensor(rng, entries)
    if fields is not None:
        at = rng.randrange(len(fields))
        name, value = fields[at]
        numbers = value.strip("[]").split(",")
        numbers[rng.randrange(len(numbers))] = rng.choice(_NUMBERS)
        fields[at] = (name, f"[{','.join(numbers)}]")
    return data


def _set_axes(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    """Another shape of the same size: ones, or zeros beside huge sizes."""
    fields = _a_tensor(rng, entries)
    if fields is not None:
        shape = rng.choice(
            ("1," * rng.choice((6, 7, 8, 9, 100, 3000)), "0,4611686018427387904,4,",
             "4611686018427387904,4,0,", "0,18446744073709551615,")
        )  # fmt: skip
        at = rng.randrange(len(fields))
        fields[at] = (fields[at][0], f"[{shape}{fields[at][1].strip('[]') or '1'}]")
    return data


def _set_value(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    fields = _a_tensor(rng, entries)
    if fields is not None:
        at = rng.randrange(len(fields))
        dtype = f'"{rng.choice((*_DTYPES, *STORAGE_TYPES))}"'
        fields[at] = (fields[at][0], rng.choice((dtype, dtype, *_VALUES)))
    return data


def _change_fields(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    fields = _a_tensor(rng, entries)
    if fields is not None:
        at = rng.randrange(len(fields))
        name, value = fields[at]
        kind = rng.randrange(5)
        if kind == 0:
            fields.insert(at, ("extra", rng.choice(_EXTRA)))
        elif kind == 1:
            fields.append((name, value))
        elif kind == 2:
            del fields[at]
        elif kind == 3:
            fields[at] = (rng.choice(("d\\u0074ype", "s\\u0068ape", "Dtype", "")), value)
        else:
            fields[at] = (name, value + rng.choice(_SPACE) + " " * rng.choice((0, 5000)))
    return data


def _change_entry(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    if not entries:
        return data
    at = rng.randrange(len(entries))
    key, fields = entries[at]
    kind = rng.randrange(6)
    if kind == 0:
        entries.insert(rng.randrange(len(entries)), (key, fields))
    elif kind == 1:
        del entries[at]
    elif kind == 2 and isinstance(fields, list):
        entries[at] = (key, f"[{','.join(value for _, value in fields)}]")
    elif kind == 3:
        entries[at] = (key, rng.choice((*_NUMBERS, *_EXTRA, '{"a":1}', '{"a":"\\ud800"}')))
    elif kind == 4:
        entries.append(('"__metadata__"', rng.choice(("null", "{}", "[]", '{"a":null}', '"x"'))))
    else:
        entries[at] = (f'"{rng.choice((*_BAD_NAMES, *_NAMES))}"', fields)
    return data


def _change_data(rng: Random, entries: list[Entry], data: bytes) -> bytes:
    return rng.choice((data + b"x", data[:-1], data * 2, b""))


_STRUCTURAL: tuple[Callable[[Random, list[Entry], bytes], bytes], ...] = (
    _set_number, _set_axes, _set_value, _change_fields, _change_fields, _change_entry, _change_data,
)  # fmt: skip


def _damage_text(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + rng.choice((*_BAD_SPACE, *_NUMBERS, *'{}[]",:')) + text[at:]
    if kind == 1:
        return text[:at] + text[at + rng.choice((1, 2, 10)) :]
    if kind == 2:
        return text[:at]
    return rng.choice(("\ufeff", "\f", "[", "\ud800")) + text


def _damage_bytes(rng: Random, file: bytes) -> bytes:
    content = bytearray(file)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content)) if content else 0
        kind = rng.randrange(3)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        else:
            del content[at : at + rng.choice((1, 8))]
    return bytes(content)
