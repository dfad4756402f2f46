"""GGUF files, valid and damaged, held against the `gguf` library.

A file is a model of one or two layers with tiny experts of any type, or a few tensors of any kind.
What is accepted, the library must read with the same keys, values and bytes; what the library reads
and we refuse, we refuse for one of `REASONS`. The files of a process lie in memory, one at a time.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.gguf.ggml_types import GGML_TYPES, READ, TYPES_BY_NAME
from hybrid_moe.loaders.gguf.gguf_header import GgufHeader, read_gguf_header
from hybrid_moe.loaders.gguf.header_bytes import LeftOut

REASONS = {
    "bytes behind": "behind the last tensor belong to no tensor",
    "hole": "follows a hole",
    "overlap": "overlaps the tensor before it",
    "alignment of data": "is not aligned to",
    "general.alignment": "general.alignment is .*, must be a power of two",
    "empty key or name": "number .* (is empty|has no name)",
    "bool": "is a bool of",
    "array of arrays": "is an array of arrays",
    "axes": "must have one to 4 axes and none of length 0|axes, at most 4 are possible",
    "rows of no whole blocks": "are no whole blocks of",
    "long name": "bytes, at most .* are read",
    "type of a tensor": "ggml type .* (is not known|was removed)",
    "big-endian": "a big-endian GGUF file",
    "version": "version .* of GGUF",
    "offset that wraps": r"its data should end at byte 184467440\d{11}\b",
}
"""Why a file that the library reads may be refused, as patterns of the message."""

_LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_NAMES = (
    "token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "x",
    "blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_exps.weight", "blk.0.ffn_gate.0.weight", "é",
)  # fmt: skip
_BAD_NAMES = ("", "x" * 1025, "blk.999999.ffn_up_exps.weight", "blk.1.ffn_up_exps.bias", "a\0b")
_HUGE = (1 << 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0, 1, 7)
_ARCHITECTURES = ("qwen3moe", "llama", "gpt-oss", "deepseek2", "unheard-of", "")


@dataclass
class Tensor:
    """A tensor as a header states it; `shape` innermost first, as in the file."""

    name: bytes
    shape: list[int]
    kind: int
    data: bytes
    offset: int | None = None
    axes: int | None = None


@dataclass
class Case:
    """All fields of a file; what is None follows from the rest.

    Attributes:
        model: sizes (layers, experts, hidden, intermediate) of a whole model, or None.
        bounded: no count or length is beyond the file, so that the library comes to an end.
    """

    keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)
    alignment: int = 32
    after: bytes = b""
    model: tuple[int, int, int, int] | None = None
    bounded: bool = True
    cut: int | None = None
    flips: list[tuple[int, int]] = field(default_factory=list)

    def content(self) -> bytes:
        """Its bytes."""
        counts = [
            len(there) if count is None else count
            for count, there in zip(self.counts, (self.tensors, self.keys), strict=True)
        ]
        head = bytearray(b"GGUF" + struct.pack("<IQQ", self.version & 0xFFFFFFFF, *counts))
        for key, value in self.keys:
            head += struct.pack("<Q", len(key)) + key + value
        data = bytearray()
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            axes = len(tensor.shape) if tensor.axes is None else tensor.axes
            head += struct.pack("<Q", len(tensor.name)) + tensor.name + struct.pack("<I", axes)
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            head += struct.pack("<IQ", tensor.kind, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        file = head + bytes(-len(head) % self.alignment) + data + self.after
        for at, value in self.flips:
            if file:
                file[at % len(file)] = value
        return bytes(file if self.cut is None else file[: self.cut % (len(file) + 1)])


def _number(kind: int, value: Any) -> bytes:
    return struct.pack(f"<I{_LETTERS[kind]}", kind, value)


def _string(value: bytes) -> bytes:
    return struct.pack("<IQ", _STRING, len(value)) + value


def _value(rng: Random) -> bytes:
    """Any value behind its type."""
    kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 10, 11, 12))
    if kind == _STRING:
        return _string(rng.choice((b"", b"text", "ä€😀".encode(), b"x" * 300)))
    if kind != _ARRAY:
        return struct.pack("<I", kind) + _scalar(rng, kind)
    of, count = rng.choice((*_LETTERS, _STRING, _STRING)), rng.choice((0, 1, 2, 5, 40))
    items = [
        struct.pack("<Q", 3) + b"abc" if of == _STRING else _scalar(rng, of) for _ in range(count)
    ]
    return struct.pack("<IIQ", _ARRAY, of, count) + b"".join(items)


def _scalar(rng: Random, kind: int) -> bytes:
    if kind == 7:
        return bytes([rng.randrange(2)])
    if kind in (6, 12):
        return struct.pack(f"<{_LETTERS[kind]}", rng.choice((0.0, 1.5, -2.0, 1e30)))
    return rng.randbytes(struct.calcsize(_LETTERS[kind]))


@cache
def _block(kind: int) -> bytes:
    """A block whose numbers are finite: fp16 with a small exponent wherever one may lie."""
    return (b"\x11\x2a" * (GGML_TYPES[kind].nbytes // 2 + 1))[: GGML_TYPES[kind].nbytes]


def _tensor(name: str, shape: list[int], kind: int) -> Tensor:
    row = GGML_TYPES[kind]
    return Tensor(name.encode(), shape, kind, _block(kind) * (math.prod(shape) // row.weights))


def generate(rng: Random) -> Case:
    """One file: a whole model or a few tensors, valid or with a few damages."""
    case = _model(rng) if rng.random() < 0.5 else _tensors(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        case.model = None
        rng.choice(_DAMAGES)(rng, case)
    return case


def _model(rng: Random) -> Case:
    layers, E = rng.choice((1, 1, 2)), rng.choice((1, 2, 3))
    up, down = rng.choice(READ), rng.choice(READ)
    H, I = (max(32, TYPES_BY_NAME[name].weights) for name in (up, down))
    architecture = rng.choice(_ARCHITECTURES[:4])
    stated = {
        "block_count": layers, "expert_count": E, "expert_used_count": 1, "embedding_length": H,
        "expert_feed_forward_length": I,
    }  # fmt: skip
    case = Case(model=(layers, E, H, I))
    case.keys.append((b"general.architecture", _string(architecture.encode())))
    case.keys += [(f"{architecture}.{k}".encode(), _number(4, v)) for k, v in stated.items()]
    for layer in range(layers):
        for name, shape, kind in (
            ("gate", [H, I, E], up), ("up", [H, I, E], up), ("down", [I, H, E], down),
        ):  # fmt: skip
            full = f"blk.{layer}.ffn_{name}_exps.weight"
            case.tensors.append(_tensor(full, shape, TYPES_BY_NAME[kind].number))
    return case


def _tensors(rng: Random) -> Case:
    case = Case()
    for number in range(rng.choice((0, 1, 2, 4))):
        case.keys.append((f"key.{number}".encode(), _value(rng)))
    if rng.random() < 0.3:
        case.alignment = rng.choice((1, 8, 32, 64, 256))
        case.keys.append((b"general.alignment", _number(4, case.alignment)))
    for name in rng.sample(_NAMES, rng.choice((0, 1, 2, 3))):
        kind = rng.choice(tuple(GGML_TYPES))
        shape = [GGML_TYPES[kind].weights * rng.choice((1, 2))]
        shape += [rng.choice((1, 2, 3)) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        case.tensors.append(_tensor(name, shape, kind))
    case.version = rng.choice((2, 3, 3))
    return case


def _damage_value(rng: Random, case: Case) -> None:
    if case.keys:
        at = rng.randrange(len(case.keys))
        case.keys[at] = (case.keys[at][0], _value(rng))


def _damage_key(rng: Random, case: Case) -> None:
    names = [key for key, _ in case.keys] + [b"general.alignment", b"", b"\xff", b"k" * 70000]
    entry = (
        rng.choice(names),
        rng.choice((_value(rng), _number(4, rng.choice((0, 3, 32, 64, 1 << 30))))),
    )
    case.keys.insert(rng.randrange(len(case.keys) + 1), entry)


def _damage_length(rng: Random, case: Case) -> None:
    """A string or an array of another length, or of another kind."""
    case.bounded = False
    if not case.keys:
        return
    at = rng.randrange(len(case.keys))
    key, value = case.keys[at]
    kind = struct.unpack_from("<I", value)[0]
    if kind == _STRING and len(value) >= 12:
        value = value[:4] + struct.pack("<Q", rng.choice(_HUGE)) + value[12:]
    elif kind == _ARRAY and len(value) >= 16:
        of = rng.choice((value[4:8], struct.pack("<I", rng.choice((_ARRAY, 13, 255)))))
        value = value[:4] + of + struct.pack("<Q", rng.choice(_HUGE)) + value[16:]
    else:
        value = struct.pack("<I", rng.choice((13, 255, 1 << 31))) + value[4:]
    case.keys[at] = (key, value)


def _damage_counts(rng: Random, case: Case) -> None:
    case.bounded = False
    counts = [rng.choice((None, *_HUGE)) for _ in range(2)]
    case.counts = (counts[0], counts[1])


def _damage_shape(rng: Random, case: Case) -> None:
    if case.tensors:
        tensor = rng.choice(case.tensors)
        if rng.random() < 0.3:
            tensor.shape = rng.choice(([], [1] * 5, [1 << 32, 1 << 32], [1 << 63, 2], [0, 4]))
        elif tensor.shape:
            tensor.shape[rng.randrange(len(tensor.shape))] = rng.choice((*_HUGE, 2, 3, 31, 33))
        if rng.random() < 0.1:
            tensor.axes = rng.choice((0, 5, 1 << 31))


def _damage_type(rng: Random, case: Case) -> None:
    if case.tensors:
        kinds = (*GGML_TYPES, 4, 31, 42, 255, (1 << 32) - 1)
        rng.choice(case.tensors).kind = rng.choice(kinds)


def _damage_offset(rng: Random, case: Case) -> None:
    if case.tensors:
        offsets = (0, 1, 16, 32, 64, 4096, 1 << 40, (1 << 64) - 32, (1 << 64) - 1)
        rng.choice(case.tensors).offset = rng.choice(offsets)


def _damage_name(rng: Random, case: Case) -> None:
    if case.tensors:
        names = [tensor.name for tensor in case.tensors] + [
            n.encode() for n in (*_NAMES, *_BAD_NAMES)
        ]
        rng.choice(case.tensors).name = rng.choice((*names, b"\xff\xfe"))


def _damage_tensors(rng: Random, case: Case) -> None:
    if case.tensors and rng.random() < 0.5:
        del case.tensors[rng.randrange(len(case.tensors))]
    else:
        case.tensors.append(_tensor(rng.choice(_NAMES), [32], rng.choice((0, 1, 2, 8))))
    case.version = rng.choice((3, 3, 3, 0, 1, 4, 3 << 24))


def _damage_end(rng: Random, case: Case) -> None:
    if rng.random() < 0.5:
        case.after = rng.choice((b"x", bytes(31), bytes(32), bytes(4096)))
    else:
        case.cut = rng.randrange(1 << 20)
        case.bounded = False


def _damage_bytes(rng: Random, case: Case) -> None:
    case.flips += [
        (rng.randrange(1 << 12), rng.randrange(256)) for _ in range(rng.choice((1, 1, 2, 8)))
    ]
    case.bounded = False


_DAMAGES = (
    _damage_value, _damage_key, _damage_length, _damage_counts, _damage_shape, _damage_shape,
    _damage_type, _damage_offset, _damage_name, _damage_tensors, _damage_end, _damage_bytes,
)  # fmt: skip


@cache
def _memory_file(process: int) -> tuple[int, Path]:
    """A file without a name, of this process."""
    descriptor = os.memfd_create("fuzz")
    return descriptor, Path(f"/proc/self/fd/{descriptor}")


def in_memory(content: bytes) -> Path:
    """A path at which the content is, until the next call."""
    descriptor, path = _memory_file(os.getpid())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    return path


def check(case: Case, against_library: bool = True, read: bool = True) -> bool:
    """Parse a file, and if `read` describe its layers and read an expert of each; returns whether
    the header was accepted."""
    content = case.content()
    path = in_memory(content)
    try:
        header = read_gguf_header(path)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 3000, "an endless message"
        assert case.model is None, message
        if against_library and case.bounded and why_refused(message) is None:
            assert library_reader(path) is None, message
        return False
    if against_library:
        check_against_library(header, content)
    if read:
        _check_layers(case, path)
    return True


def _check_layers(case: Case, path: Path) -> None:
    """Every layer is described and an expert of it read, or refused by name."""
    try:
        checkpoint = Checkpoint.open(path, require_complete=False)
        sources = [checkpoint.layer(number) for number in checkpoint.layers]
        for source in sources:
            assert min(source.num_experts, source.hidden, source.intermediate) > 0
            expert = source.expert(source.num_experts - 1)
            formats, N, K = source.formats, source.intermediate, source.hidden
            assert expert.gate.codes.shape == formats.gate_up.code_shape(N, K)
            assert expert.down.codes.shape == formats.down.code_shape(K, N)
    except CheckpointError as error:
        assert case.model is None, str(error)
        return
    if case.model is not None:
        layers, *sizes = case.model
        assert len(sources) == layers
        for source in sources:
            assert [source.num_experts, source.hidden, source.intermediate] == sizes


def why_refused(message: str) -> str | None:
    """The reason of `REASONS` in the message."""
    return next((name for name, text in REASONS.items() if re.search(text, message)), None)


def library_reader(path: Path) -> gguf.GGUFReader | None:
    """The library's reader of a file; None where it reads none."""
    try:
        return gguf.GGUFReader(path)
    except Exception:  # it raises what NumPy raises, and asserts
        return None


def check_against_library(header: GgufHeader, content: bytes) -> None:
    """Raise where the library reads anything else than we do."""
    reader = library_reader(header.file)
    assert reader is not None, "read what the library refuses"
    fields = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(header.metadata)
    for key, value in header.metadata.items():
        if isinstance(value, LeftOut):  # of strings that nobody needs not even UTF-8 is asked
            is_text = fields[key].types == [gguf.GGUFValueType.STRING]
            assert value.count == len(fields[key].parts[-1] if is_text else fields[key].data)
            continue
        found: Any = fields[key].contents()
        if value != value:  # NaN
            assert found != found
        else:
            ours = np.asarray(list(value) if isinstance(value, tuple) else value)
            assert np.array_equal(ours, np.asarray(found), equal_nan=ours.dtype.kind == "f")
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert set(theirs) == {tensor.stored_name for tensor in header.tensors}
    for tensor in header.tensors:
        other = theirs[tensor.stored_name]
        assert tensor.dtype == other.tensor_type.name
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert (tensor.offset, tensor.nbytes) == (other.data_offset, other.n_bytes)
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == other.data.tobytes()
